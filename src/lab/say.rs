//! What the commands print: whole lines to standard output, whether or not somebody still reads them.

use std::fmt::Arguments;
use std::io::Write;

/// Prints a line. A reader that went away (`| head`) must not keep a lab from being taken down.
pub fn line(text: Arguments) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{text}").and_then(|()| out.flush());
}

/// `println!` that outlives its reader.
macro_rules! say {
    ($($text:tt)*) => { $crate::lab::say::line(format_args!($($text)*)) };
}

pub(super) use say;
