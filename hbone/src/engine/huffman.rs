//! The Huffman code of HPACK (RFC 7541 appendix B), read only: Warren writes its few header bytes plainly.

/// Bits of each symbol's code; the last symbol ends a string. The code is canonical: codes of one length are
/// consecutive in the order of their symbols, so that the lengths say it all.
const LENGTHS: [u8; 257] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 30, 28,
    28, 28, 28, 28, 28, 28, 28, 28, 6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6, 5, 5,
    5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12, 10, 13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7,
    7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6, 15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6,
    6, 5, 6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7, 15, 11, 14, 13, 28, 20, 22, 20, 20, 22, 22, 22, 23, 22,
    23, 23, 23, 23, 23, 24, 23, 24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24, 22,
    21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23, 21, 21, 22, 21, 23, 22, 23, 23, 20,
    22, 22, 22, 23, 22, 22, 23, 26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25, 19,
    21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28, 27, 27, 27, 20, 24, 20, 21, 22, 21, 21, 23, 22,
    22, 25, 25, 24, 24, 26, 23, 26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26, 30,
];
const END: u16 = 256;
const LONGEST: usize = 30;

/// The symbols by code, and where each length begins.
struct Code {
    symbols: [u16; 257],
    /// By length: the first code, the place of its symbol, how many there are.
    lengths: [(u32, u16, u16); LONGEST + 1],
}

static CODE: Code = Code::new();

impl Code {
    const fn new() -> Self {
        let mut symbols = [0; 257];
        let mut lengths = [(0, 0, 0); LONGEST + 1];
        let (mut length, mut code, mut place) = (1, 0u32, 0u16);
        while length <= LONGEST {
            let first = place;
            let mut symbol = 0;
            while symbol < LENGTHS.len() {
                if LENGTHS[symbol] as usize == length {
                    symbols[place as usize] = symbol as u16;
                    place += 1;
                }
                symbol += 1;
            }
            lengths[length] = (code, first, place - first);
            code = (code + (place - first) as u32) << 1;
            length += 1;
        }
        Self { symbols, lengths }
    }
}

/// Appends the decoded string to `out`; false when it is not a Huffman string (RFC 7541 §5.2).
pub fn decode(input: &[u8], out: &mut Vec<u8>) -> bool {
    let (mut code, mut length) = (0u32, 0usize);
    for byte in input {
        for bit in (0..8).rev() {
            code = code << 1 | u32::from(byte >> bit & 1);
            length += 1;
            if length > LONGEST {
                return false;
            }
            let (first, place, count) = CODE.lengths[length];
            let Some(index) = code.checked_sub(first).filter(|i| *i < u32::from(count)) else {
                continue;
            };
            match CODE.symbols[usize::from(place) + index as usize] {
                END => return false,
                symbol => out.push(symbol as u8),
            }
            (code, length) = (0, 0);
        }
    }
    // What is left must be padding: fewer than eight ones.
    length < 8 && code == (1 << length) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_examples_of_the_standard_are_read() {
        let mut out = Vec::new();
        let www = [
            0xf1, 0xe3, 0xc2, 0xe5, 0xf2, 0x3a, 0x6b, 0xa0, 0xab, 0x90, 0xf4, 0xff,
        ];
        assert!(decode(&www, &mut out));
        assert_eq!(out, b"www.example.com");
        out.clear();
        assert!(decode(&[0x64, 0x02], &mut out));
        assert_eq!(out, b"302");
        out.clear();
        assert!(decode(&[], &mut out) && out.is_empty());
    }

    #[test]
    fn wrong_padding_and_the_end_symbol_are_refused() {
        for wrong in [
            &[0x64, 0x02, 0x00][..],
            &[0xff],
            &[0xff, 0xff, 0xff, 0xff],
            &[0x00, 0xff, 0xff],
        ] {
            assert!(!decode(wrong, &mut Vec::new()), "{wrong:x?}");
        }
    }

    #[test]
    fn the_code_is_complete() {
        let sum: u64 = LENGTHS.iter().map(|length| 1 << (32 - length)).sum();
        assert_eq!(sum, 1 << 32);
    }
}
