//! What a lab says while it comes up: lines on a pipe to the command that started it.

use std::io::{BufRead, Write};

/// One line of the pipe.
#[derive(Debug, PartialEq, Eq)]
pub enum Progress {
    Step(String),
    Failed(String),
    Ready,
}

impl Progress {
    /// Writes the line to standard output; nobody may be listening any more.
    pub fn tell(&self) {
        let text = |text: &str| text.replace('\n', "; ");
        let line = match self {
            Self::Step(step) => format!("+{}\n", text(step)),
            Self::Failed(reason) => format!("!{}\n", text(reason)),
            Self::Ready => "=\n".to_owned(),
        };
        let mut out = std::io::stdout();
        let _ = out.write_all(line.as_bytes()).and_then(|()| out.flush());
    }

    /// The next line that is one of these; `None` at the end.
    pub fn next(lines: &mut impl BufRead) -> Option<Self> {
        let mut line = String::new();
        loop {
            line.clear();
            if lines.read_line(&mut line).ok()? == 0 {
                return None;
            }
            let rest = line.get(1..).unwrap_or_default().trim_end();
            match line.as_bytes().first() {
                Some(b'+') => return Some(Self::Step(rest.to_owned())),
                Some(b'!') => return Some(Self::Failed(rest.to_owned())),
                Some(b'=') => return Some(Self::Ready),
                _ => {}
            }
        }
    }
}

/// Says that a step is done.
pub fn step(text: impl Into<String>) {
    Progress::Step(text.into()).tell();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_as_they_were_written() {
        let mut lines: &[u8] = b"+one\nnoise\n!two\n=\n";
        assert_eq!(
            Progress::next(&mut lines),
            Some(Progress::Step("one".into()))
        );
        assert_eq!(
            Progress::next(&mut lines),
            Some(Progress::Failed("two".into()))
        );
        assert_eq!(Progress::next(&mut lines), Some(Progress::Ready));
        assert_eq!(Progress::next(&mut lines), None);
    }
}
