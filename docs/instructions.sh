#!/bin/sh
# Counts the instructions that each pure part of the data path takes, with valgrind; they hardly depend on the machine.
set -eu
command -v valgrind >/dev/null || {
    echo "valgrind is missing: apt-get install valgrind" >&2
    exit 1
}
times=1000
bench=$(cargo bench --quiet --features internals --bench pure --no-run --message-format json 2>/dev/null |
    sed -n 's/.*"executable":"\([^"]*\/pure-[^"]*\)".*/\1/p' | tail -n 1)
echo "| case | instructions |"
echo "|---|---|"
WARREN_COUNT=list "$bench" | while IFS= read -r case; do
    total=$(WARREN_COUNT=$case WARREN_TIMES=$times valgrind --tool=callgrind --callgrind-out-file=/dev/null \
        --collect-atstart=no --toggle-collect='*counted*' "$bench" 2>&1 | sed -n 's/.*Collected : //p')
    echo "| $case | $((total / times)) |"
done
