//! Header blocks (RFC 7541): a bounded decoder with a dynamic table, and an encoder that keeps no state.

use std::collections::VecDeque;

use super::huffman;

/// What both ends start with, and what Warren leaves in force (RFC 9113 §6.5.2), in bytes.
const TABLE_SIZE: usize = 4096;
/// What an entry costs beyond its bytes (RFC 7541 §4.1).
const OVERHEAD: usize = 32;

/// RFC 7541 appendix A.
const STATIC: [(&str, &str); 61] = [
    (":authority", ""),
    (":method", "GET"),
    (":method", "POST"),
    (":path", "/"),
    (":path", "/index.html"),
    (":scheme", "http"),
    (":scheme", "https"),
    (":status", "200"),
    (":status", "204"),
    (":status", "206"),
    (":status", "304"),
    (":status", "400"),
    (":status", "404"),
    (":status", "500"),
    ("accept-charset", ""),
    ("accept-encoding", "gzip, deflate"),
    ("accept-language", ""),
    ("accept-ranges", ""),
    ("accept", ""),
    ("access-control-allow-origin", ""),
    ("age", ""),
    ("allow", ""),
    ("authorization", ""),
    ("cache-control", ""),
    ("content-disposition", ""),
    ("content-encoding", ""),
    ("content-language", ""),
    ("content-length", ""),
    ("content-location", ""),
    ("content-range", ""),
    ("content-type", ""),
    ("cookie", ""),
    ("date", ""),
    ("etag", ""),
    ("expect", ""),
    ("expires", ""),
    ("from", ""),
    ("host", ""),
    ("if-match", ""),
    ("if-modified-since", ""),
    ("if-none-match", ""),
    ("if-range", ""),
    ("if-unmodified-since", ""),
    ("last-modified", ""),
    ("link", ""),
    ("location", ""),
    ("max-forwards", ""),
    ("proxy-authenticate", ""),
    ("proxy-authorization", ""),
    ("range", ""),
    ("referer", ""),
    ("refresh", ""),
    ("retry-after", ""),
    ("server", ""),
    ("set-cookie", ""),
    ("strict-transport-security", ""),
    ("transfer-encoding", ""),
    ("user-agent", ""),
    ("vary", ""),
    ("via", ""),
    ("www-authenticate", ""),
];

/// Places in the static table that the encoder names.
const AUTHORITY: u8 = 1;
const METHOD: u8 = 2;
const STATUS: u8 = 8;

/// A header block that breaks the rules; the tunnel cannot go on (RFC 9113 §4.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Invalid;

/// A name and its value.
type Entry = (Box<[u8]>, Box<[u8]>);

/// The reading end's state of a connection.
#[derive(Clone, Debug)]
pub struct Decoder {
    /// Newest first.
    table: VecDeque<Entry>,
    size: usize,
    limit: usize,
}

impl Default for Decoder {
    fn default() -> Self {
        Self {
            table: VecDeque::new(),
            size: 0,
            limit: TABLE_SIZE,
        }
    }
}

impl Decoder {
    /// Reads a whole block and gives every field to `field`; false when the list is larger than `limit` bytes, and
    /// then only the first fields were given (the table is kept right all the same).
    pub fn decode(
        &mut self,
        block: &[u8],
        limit: usize,
        mut field: impl FnMut(&[u8], &[u8]),
    ) -> Result<bool, Invalid> {
        let mut rest = block;
        let (mut size, mut started) = (0usize, false);
        while let Some(&first) = rest.first() {
            if first & 0xe0 == 0x20 {
                // A new table size is only allowed at the start (RFC 7541 §4.2).
                let new = integer(&mut rest, 5)?;
                if started || new > TABLE_SIZE {
                    return Err(Invalid);
                }
                self.limit = new;
                self.evict();
                continue;
            }
            started = true;
            let mut give = |name: &[u8], value: &[u8]| {
                size = size.saturating_add(name.len() + value.len() + OVERHEAD);
                if size <= limit {
                    field(name, value);
                }
            };
            if first & 0x80 != 0 {
                let index = integer(&mut rest, 7)?;
                let (name, value) = self.entry(index).ok_or(Invalid)?;
                give(name, value);
                continue;
            }
            let indexed = first & 0x40 != 0;
            let index = integer(&mut rest, if indexed { 6 } else { 4 })?;
            let name: Box<[u8]> = match index {
                0 => string(&mut rest)?,
                _ => self.entry(index).ok_or(Invalid)?.0.into(),
            };
            let value = string(&mut rest)?;
            give(&name, &value);
            if indexed {
                self.size += name.len() + value.len() + OVERHEAD;
                self.table.push_front((name, value));
                self.evict();
            }
        }
        Ok(size <= limit)
    }

    fn entry(&self, index: usize) -> Option<(&[u8], &[u8])> {
        let place = index.checked_sub(1)?;
        match STATIC.get(place) {
            Some((name, value)) => Some((name.as_bytes(), value.as_bytes())),
            None => {
                let (name, value) = self.table.get(place - STATIC.len())?;
                Some((name, value))
            }
        }
    }

    fn evict(&mut self) {
        while self.size > self.limit {
            match self.table.pop_back() {
                Some((name, value)) => self.size -= name.len() + value.len() + OVERHEAD,
                None => self.size = 0,
            }
        }
    }
}

/// RFC 7541 §5.1, with a bound far above anything a block can mean.
fn integer(rest: &mut &[u8], bits: u32) -> Result<usize, Invalid> {
    let mask = (1usize << bits) - 1;
    let (first, mut tail) = rest.split_first().ok_or(Invalid)?;
    let mut value = usize::from(*first) & mask;
    if value == mask {
        let mut shift = 0;
        loop {
            let (byte, after) = tail.split_first().ok_or(Invalid)?;
            tail = after;
            value += usize::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                break;
            }
            shift += 7;
            if shift > 21 {
                return Err(Invalid);
            }
        }
    }
    *rest = tail;
    Ok(value)
}

fn string(rest: &mut &[u8]) -> Result<Box<[u8]>, Invalid> {
    let huffman = rest.first().ok_or(Invalid)? & 0x80 != 0;
    let length = integer(rest, 7)?;
    let (text, after) = rest.split_at_checked(length).ok_or(Invalid)?;
    *rest = after;
    if !huffman {
        return Ok(text.into());
    }
    let mut out = Vec::with_capacity(length * 2);
    match huffman::decode(text, &mut out) {
        true => Ok(out.into()),
        false => Err(Invalid),
    }
}

/// Writes header blocks that leave no trace in the peer's table.
pub struct Encoder<'a>(pub &'a mut Vec<u8>);

impl Encoder<'_> {
    /// Tells the peer, who made its table smaller, that nothing will be put into it (RFC 7541 §4.2).
    pub fn empty_table(&mut self) {
        self.0.push(0x20);
    }

    pub fn connect(&mut self, authority: &str) {
        self.literal(METHOD, b"CONNECT");
        self.literal(AUTHORITY, authority.as_bytes());
    }

    pub fn status(&mut self, status: u16) {
        if status == 200 {
            self.0.push(0x80 | STATUS);
        } else {
            let digits = [status / 100 % 10, status / 10 % 10, status % 10].map(|d| b'0' + d as u8);
            self.literal(STATUS, &digits);
        }
    }

    /// A field whose name is not in the static table; `name` in lower case.
    pub fn field(&mut self, name: &str, value: &str) {
        self.literal(0, name.as_bytes());
        self.bytes(value.as_bytes());
    }

    /// With `place` 0 only the name is written, which is `text`; else the value of the name at `place`.
    fn literal(&mut self, place: u8, text: &[u8]) {
        self.0.push(place);
        self.bytes(text);
    }

    fn bytes(&mut self, text: &[u8]) {
        let mut left = text.len();
        if left < 0x7f {
            self.0.push(left as u8);
        } else {
            self.0.push(0x7f);
            left -= 0x7f;
            while left >= 0x80 {
                self.0.push(left as u8 | 0x80);
                left >>= 7;
            }
            self.0.push(left as u8);
        }
        self.0.extend_from_slice(text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Fields = Vec<(String, String)>;

    fn read(decoder: &mut Decoder, block: &[u8]) -> Result<Fields, Invalid> {
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        let mut fields = Fields::new();
        let whole = decoder.decode(block, 1 << 14, |n, v| fields.push((text(n), text(v))))?;
        assert!(whole);
        Ok(fields)
    }

    fn fields(list: &[(&str, &str)]) -> Fields {
        list.iter()
            .map(|(n, v)| (n.to_string(), v.to_string()))
            .collect()
    }

    #[test]
    fn the_examples_of_the_standard_are_read_with_their_table() {
        // RFC 7541 §C.4.1 and §C.4.2.
        let mut decoder = Decoder::default();
        let first = [
            0x82, 0x86, 0x84, 0x41, 0x8c, 0xf1, 0xe3, 0xc2, 0xe5, 0xf2, 0x3a, 0x6b, 0xa0, 0xab,
            0x90, 0xf4, 0xff,
        ];
        let expected = [
            (":method", "GET"),
            (":scheme", "http"),
            (":path", "/"),
            (":authority", "www.example.com"),
        ];
        assert_eq!(read(&mut decoder, &first), Ok(fields(&expected)));
        let second = [
            0x82, 0x86, 0x84, 0xbe, 0x58, 0x86, 0xa8, 0xeb, 0x10, 0x64, 0x9c, 0xbf,
        ];
        let with_cache = [&expected[..], &[("cache-control", "no-cache")]].concat();
        assert_eq!(read(&mut decoder, &second), Ok(fields(&with_cache)));
        assert_eq!(decoder.size, 110);
    }

    #[test]
    fn what_is_written_is_read_again_and_leaves_no_trace() {
        let mut block = Vec::new();
        let mut encoder = Encoder(&mut block);
        let long = "x".repeat(1000);
        encoder.empty_table();
        encoder.connect("10.0.0.1:80");
        encoder.field("baggage", &long);
        let mut decoder = Decoder::default();
        assert_eq!(
            read(&mut decoder, &block),
            Ok(fields(&[
                (":method", "CONNECT"),
                (":authority", "10.0.0.1:80"),
                ("baggage", &long)
            ]))
        );
        assert!(decoder.table.is_empty());
        for status in [200, 401, 503] {
            let mut block = Vec::new();
            Encoder(&mut block).status(status);
            assert_eq!(
                read(&mut Decoder::default(), &block),
                Ok(fields(&[(":status", &status.to_string())]))
            );
        }
    }

    #[test]
    fn the_table_is_bounded_and_sizes_above_ours_are_refused() {
        let mut decoder = Decoder::default();
        for _ in 0..100 {
            let mut block = vec![0x40];
            Encoder(&mut block).bytes(b"name");
            Encoder(&mut block).bytes(&[b'v'; 500]);
            decoder.decode(&block, 1 << 14, |_, _| {}).unwrap();
            assert!(decoder.size <= TABLE_SIZE);
        }
        assert_eq!(decoder.table.len(), 7);
        decoder.decode(&[0x20], 100, |_, _| {}).unwrap();
        assert_eq!((decoder.size, decoder.table.len()), (0, 0));
        assert_eq!(
            decoder.decode(&[0x3f, 0xe2, 0x1f], 100, |_, _| {}),
            Err(Invalid)
        );
    }

    #[test]
    fn broken_blocks_are_refused_and_long_lists_cut() {
        for broken in [
            &[0x80][..],
            &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
            &[0xbe],
            &[0x40],
            &[0x00, 0x05, b'a'],
            &[0x00, 0x01, b'a'],
            &[0x82, 0x20],
            &[0x00, 0x81, 0x00, 0x00],
        ] {
            let result = Decoder::default().decode(broken, 100, |_, _| {});
            assert_eq!(result, Err(Invalid), "{broken:x?}");
        }
        let mut given = 0;
        let whole = Decoder::default().decode(&[0x82, 0x82, 0x82], 100, |_, _| given += 1);
        assert_eq!((whole, given), (Ok(false), 2));
    }
}
