//! Profiles in the format of `pprof` (its `profile.proto`), with the functions' names looked up in the program.

use std::collections::HashMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use backtrace::SymbolName;
use libc::c_void;
use prost::Message;

use crate::memory;

/// A name and its unit.
pub type Kind = (&'static str, &'static str);

#[derive(Clone, PartialEq, Message)]
struct Profile {
    #[prost(message, repeated, tag = "1")]
    sample_type: Vec<ValueType>,
    #[prost(message, repeated, tag = "2")]
    sample: Vec<Sample>,
    #[prost(message, repeated, tag = "3")]
    mapping: Vec<Mapping>,
    #[prost(message, repeated, tag = "4")]
    location: Vec<Location>,
    #[prost(message, repeated, tag = "5")]
    function: Vec<Function>,
    /// The first is empty; whatever is a text elsewhere is a place in this list.
    #[prost(string, repeated, tag = "6")]
    string_table: Vec<String>,
    #[prost(int64, tag = "7")]
    drop_frames: i64,
    #[prost(int64, tag = "9")]
    time_nanos: i64,
    #[prost(int64, tag = "10")]
    duration_nanos: i64,
    #[prost(message, optional, tag = "11")]
    period_type: Option<ValueType>,
    #[prost(int64, tag = "12")]
    period: i64,
    #[prost(int64, repeated, tag = "13")]
    comment: Vec<i64>,
    #[prost(int64, tag = "14")]
    default_sample_type: i64,
}

#[derive(Clone, PartialEq, Message)]
struct ValueType {
    #[prost(int64, tag = "1")]
    kind: i64,
    #[prost(int64, tag = "2")]
    unit: i64,
}

#[derive(Clone, PartialEq, Message)]
struct Sample {
    #[prost(uint64, repeated, tag = "1")]
    location_id: Vec<u64>,
    #[prost(int64, repeated, tag = "2")]
    value: Vec<i64>,
    #[prost(message, repeated, tag = "3")]
    label: Vec<Label>,
}

#[derive(Clone, PartialEq, Message)]
struct Label {
    #[prost(int64, tag = "1")]
    key: i64,
    #[prost(int64, tag = "2")]
    text: i64,
}

#[derive(Clone, PartialEq, Message)]
struct Mapping {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(uint64, tag = "2")]
    memory_start: u64,
    #[prost(uint64, tag = "3")]
    memory_limit: u64,
    #[prost(uint64, tag = "4")]
    file_offset: u64,
    #[prost(int64, tag = "5")]
    filename: i64,
    #[prost(bool, tag = "7")]
    has_functions: bool,
    #[prost(bool, tag = "8")]
    has_filenames: bool,
    #[prost(bool, tag = "9")]
    has_line_numbers: bool,
    #[prost(bool, tag = "10")]
    has_inline_frames: bool,
}

#[derive(Clone, PartialEq, Message)]
struct Location {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(uint64, tag = "2")]
    mapping_id: u64,
    #[prost(uint64, tag = "3")]
    address: u64,
    /// The innermost of the inlined functions first.
    #[prost(message, repeated, tag = "4")]
    line: Vec<Line>,
}

#[derive(Clone, PartialEq, Message)]
struct Line {
    #[prost(uint64, tag = "1")]
    function_id: u64,
    #[prost(int64, tag = "2")]
    line: i64,
}

#[derive(Clone, PartialEq, Message)]
struct Function {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(int64, tag = "2")]
    name: i64,
    #[prost(int64, tag = "3")]
    system_name: i64,
    #[prost(int64, tag = "4")]
    filename: i64,
}

/// A profile in the making. Looking names up reads the program's debug information: keep it off threads that serve.
pub struct Builder {
    profile: Profile,
    strings: HashMap<String, i64>,
    /// By name and file.
    functions: HashMap<(i64, i64), u64>,
    /// By address.
    locations: HashMap<u64, u64>,
}

impl Builder {
    /// A profile whose samples have values of these kinds, and whose sampling had that period.
    pub fn new(kinds: &[Kind], period: (Kind, i64)) -> Self {
        let mut this = Self {
            profile: Profile::default(),
            strings: HashMap::new(),
            functions: HashMap::new(),
            locations: HashMap::new(),
        };
        this.string("");
        this.profile.sample_type = kinds.iter().map(|kind| this.kind(*kind)).collect();
        this.profile.period_type = Some(this.kind(period.0));
        this.profile.period = period.1;
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        this.profile.time_nanos = now.map_or(0, nanos);
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
        for (place, map) in maps.lines().filter_map(map).enumerate() {
            let filename = this.string(map.path);
            this.profile.mapping.push(Mapping {
                id: place as u64 + 1,
                memory_start: map.start,
                memory_limit: map.end,
                file_offset: map.offset,
                filename,
                ..Mapping::default()
            });
        }
        this
    }

    /// How long the samples were taken.
    pub fn lasted(&mut self, time: Duration) {
        self.profile.duration_nanos = nanos(time);
    }

    /// The kind of value to look at first.
    pub fn shows(&mut self, kind: &str) {
        self.profile.default_sample_type = self.string(kind);
    }

    /// Leaves functions whose whole name a regular expression matches, and what they call, out of the view.
    pub fn hides(&mut self, functions: &str) {
        self.profile.drop_frames = self.string(functions);
    }

    /// Something that readers of the profile ought to know.
    pub fn remark(&mut self, text: &str) {
        let text = self.string(text);
        self.profile.comment.push(text);
    }

    /// Adds a stack, the innermost frame first, with its values and labels.
    pub fn sample(&mut self, frames: &[u64], values: Vec<i64>, labels: &[(&str, &str)]) {
        let location_id = frames.iter().map(|frame| self.location(*frame)).collect();
        let label = labels.iter().map(|(key, text)| Label {
            key: self.string(key),
            text: self.string(text),
        });
        let label = label.collect();
        self.profile.sample.push(Sample {
            location_id,
            value: values,
            label,
        });
    }

    /// The profile in its binary form, not compressed.
    pub fn finish(self) -> Vec<u8> {
        let bytes = self.profile.encode_to_vec();
        drop(self);
        // What was read for the names is many times the size of what was found.
        backtrace::clear_symbol_cache();
        memory::give_back();
        bytes
    }

    fn kind(&mut self, (kind, unit): Kind) -> ValueType {
        ValueType {
            kind: self.string(kind),
            unit: self.string(unit),
        }
    }

    fn string(&mut self, text: &str) -> i64 {
        if let Some(known) = self.strings.get(text) {
            return *known;
        }
        let place = self.profile.string_table.len() as i64;
        self.profile.string_table.push(text.to_string());
        self.strings.insert(text.to_string(), place);
        place
    }

    fn location(&mut self, address: u64) -> u64 {
        if let Some(known) = self.locations.get(&address) {
            return *known;
        }
        let mut line = Vec::new();
        // The look-up takes its argument for a return address.
        backtrace::resolve((address + 1) as *mut c_void, |symbol| {
            let Some(name) = symbol.name() else { return };
            let file = symbol
                .filename()
                .map(|file| file.to_string_lossy().into_owned());
            line.push(Line {
                function_id: self.function(&name, &file.unwrap_or_default()),
                line: symbol.lineno().unwrap_or(0).into(),
            });
        });
        let id = self.profile.location.len() as u64 + 1;
        let mapping = self
            .profile
            .mapping
            .iter_mut()
            .find(|mapping| (mapping.memory_start..mapping.memory_limit).contains(&address));
        let mapping_id = mapping.map_or(0, |mapping| {
            // Whoever reads the profile looks for names of its own where there are none.
            mapping.has_functions |= !line.is_empty();
            mapping.has_filenames |= !line.is_empty();
            mapping.has_line_numbers |= !line.is_empty();
            mapping.has_inline_frames |= !line.is_empty();
            mapping.id
        });
        self.profile.location.push(Location {
            id,
            mapping_id,
            address,
            line,
        });
        self.locations.insert(address, id);
        id
    }

    fn function(&mut self, symbol: &SymbolName, file: &str) -> u64 {
        let (name, filename) = (self.string(&format!("{symbol:#}")), self.string(file));
        let next = self.profile.function.len() as u64 + 1;
        let id = *self.functions.entry((name, filename)).or_insert(next);
        if id == next {
            let system_name = self.string(symbol.as_str().unwrap_or_default());
            self.profile.function.push(Function {
                id,
                name,
                // Where it is the same as the name, readers take that for one of C++ and cut what is between angle brackets.
                system_name,
                filename,
            });
        }
        id
    }
}

/// As profiles count time.
pub fn nanos(time: Duration) -> i64 {
    time.as_nanos().try_into().unwrap_or(i64::MAX)
}

/// A file's code in memory.
#[derive(Debug, PartialEq)]
struct Map<'a> {
    start: u64,
    end: u64,
    offset: u64,
    path: &'a str,
}

/// A line of `/proc/self/maps`, if it is of code with a name.
fn map(line: &str) -> Option<Map<'_>> {
    let mut fields = line.splitn(6, ' ');
    let (start, end) = fields.next()?.split_once('-')?;
    if !fields.next()?.contains('x') {
        return None;
    }
    let hex = |text| u64::from_str_radix(text, 16).ok();
    let offset = hex(fields.next()?)?;
    let path = fields.nth(2)?.trim_start();
    (!path.is_empty()).then_some(Map {
        start: hex(start)?,
        end: hex(end)?,
        offset,
        path,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stack_becomes_locations_with_names() {
        let here = a_stack_becomes_locations_with_names as *const () as u64;
        let mut builder = Builder::new(&[("cpu", "nanoseconds")], (("cpu", "nanoseconds"), 5));
        builder.sample(&[here, 1], vec![7], &[("thread", "worker-0")]);
        builder.sample(&[here], vec![8], &[]);
        let profile = Profile::decode(&*builder.finish()).unwrap();
        let text = |place: i64| &*profile.string_table[place as usize];
        assert_eq!(text(0), "");
        assert_eq!(profile.sample[0].location_id, [1, 2]);
        assert_eq!(profile.sample[1].location_id, [1]);
        assert_eq!(text(profile.sample[0].label[0].text), "worker-0");
        let [known, unknown] = &profile.location[..] else {
            panic!("{:?}", profile.location);
        };
        assert_eq!((unknown.mapping_id, unknown.line.len()), (0, 0));
        let function = &profile.function[known.line[0].function_id as usize - 1];
        let name = text(function.name);
        assert!(
            name.ends_with("a_stack_becomes_locations_with_names"),
            "{name}"
        );
        assert!(text(function.filename).ends_with("src/profile/pprof.rs"));
        let mapping = &profile.mapping[known.mapping_id as usize - 1];
        assert!(mapping.has_functions);
        let program = std::env::current_exe().unwrap();
        assert_eq!(text(mapping.filename), program.to_str().unwrap());
    }

    #[test]
    fn only_named_code_is_a_mapping() {
        let code = "55d0-55e0 r-xp 0000a000 fe:01 123     /usr/bin/a b";
        let found = Map {
            start: 0x55d0,
            end: 0x55e0,
            offset: 0xa000,
            path: "/usr/bin/a b",
        };
        assert_eq!(map(code), Some(found));
        for line in [
            "55d0-55e0 rw-p 0000a000 fe:01 123     /usr/bin/a",
            "55d0-55e0 r-xp 00000000 00:00 0 ",
            "55d0-55e0 r-xp 00000000 00:00 0",
            "junk",
            "",
        ] {
            assert_eq!(map(line), None, "{line}");
        }
    }
}
