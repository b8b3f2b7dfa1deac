#!/usr/bin/env python3
"""Draws docs/plots/*.svg from docs/measurements.csv: lines `series,x,y...`, one plot for each series."""
import csv
import math
import pathlib

HERE = pathlib.Path(__file__).parent
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 560, 300, 70, 50, 40, 20
# series: title, name of x, name of y, which column is y
PLOTS = {
    "flows": ("CPU of both proxies for a request, by open flows", "keep-alive connections", "us per request", 0),
    "pods": ("Resident memory of a node's proxy, by captured pods", "pods", "MiB", 0),
    "workloads": ("Resident memory of a node's proxy, by workloads in the mesh", "workloads", "MiB", 1),
    "connections": ("CPU of both proxies for a new connection, by workloads in the mesh", "workloads", "us per connection", 0),
}


def nice(top):
    """A round number of at least `top`."""
    step = 10 ** math.floor(math.log10(top))
    return next(step * factor for factor in (1, 2, 5, 10) if step * factor >= top)


def plot(title, x_name, y_name, points):
    top = nice(max(y for _, y in points))
    logs = [math.log10(x) for x, _ in points]
    low, high = min(logs), max(logs)
    place_x = lambda x: LEFT + (math.log10(x) - low) / (high - low) * (WIDTH - LEFT - RIGHT)
    place_y = lambda y: HEIGHT - BOTTOM - y / top * (HEIGHT - BOTTOM - TOP)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{WIDTH / 2}" y="20" text-anchor="middle" font-size="14">{title}</text>',
        f'<text x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">{x_name} (logarithmic)</text>',
        f'<text x="16" y="{HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 16 {HEIGHT / 2})">{y_name}</text>',
    ]
    for part in range(5):
        y = top * part / 4
        out.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place_y(y):.1f}" y2="{place_y(y):.1f}" stroke="#ddd"/>')
        out.append(f'<text x="{LEFT - 6}" y="{place_y(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x, y in points:
        out.append(f'<text x="{place_x(x):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{x:,.0f}</text>')
        out.append(f'<circle cx="{place_x(x):.1f}" cy="{place_y(y):.1f}" r="3.5" fill="#0a58a6"/>')
    line = " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in points)
    out.append(f'<polyline points="{line}" fill="none" stroke="#0a58a6" stroke-width="1.5"/>')
    return "\n".join(out + ["</svg>", ""])


def main():
    series = {}
    with open(HERE / "measurements.csv", newline="") as file:
        for name, x, *values in csv.reader(file):
            series.setdefault(name, []).append((float(x), [float(value) for value in values]))
    (HERE / "plots").mkdir(exist_ok=True)
    for name, (title, x_name, y_name, column) in PLOTS.items():
        points = sorted((x, values[column]) for x, values in series[name])
        (HERE / "plots" / f"{name}.svg").write_text(plot(title, x_name, y_name, points))


if __name__ == "__main__":
    main()
