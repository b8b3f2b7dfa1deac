//! What is logged: levels for everything and for single targets, as an operator writes them.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;

/// A list of levels, at most one for each target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter(Vec<Directive>);

/// A level for a target, and for whatever is below it; the empty target is everything else.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Directive {
    target: String,
    level: LevelFilter,
}

/// A part that is neither a level nor a target with a level.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{0:?} is neither a level (off, error, warn, info, debug, trace) nor target=level")]
pub struct NoDirective(String);

impl Default for Filter {
    /// What is logged unless something else is asked for.
    fn default() -> Self {
        let directive = |target: &str, level| Directive {
            target: target.to_string(),
            level,
        };
        Self(vec![
            directive("hickory_server::server", LevelFilter::OFF),
            directive("", LevelFilter::INFO),
        ])
    }
}

impl Filter {
    /// The default with the parts of a `RUST_LOG`; there a bare target stands for all its levels.
    ///
    /// # Errors
    /// The first part that cannot be understood.
    pub fn from_variable(text: &str) -> Result<Self, NoDirective> {
        let mut filter = Self::default();
        for part in parts(text) {
            let directive = part.parse().or_else(|error| match is_target(part) {
                true => Ok(Directive {
                    target: part.to_string(),
                    level: LevelFilter::TRACE,
                }),
                false => Err(error),
            })?;
            filter.set(directive);
        }
        Ok(filter)
    }

    /// This filter with further levels, which replace those of the same targets.
    ///
    /// # Errors
    /// The first part that is neither a level nor `target=level` (or `target:level`).
    pub fn with(&self, text: &str) -> Result<Self, NoDirective> {
        let mut filter = self.clone();
        for part in parts(text) {
            filter.set(part.parse()?);
        }
        Ok(filter)
    }

    fn set(&mut self, directive: Directive) {
        self.0.retain(|known| known.place() != directive.place());
        self.0.push(directive);
        // As it is applied: the more of a target is given, the earlier it counts.
        self.0
            .sort_by(|a, b| (b.target.len(), &a.target).cmp(&(a.target.len(), &b.target)));
    }

    /// The same for the log's machinery.
    pub fn targets(&self) -> Targets {
        self.0.iter().fold(Targets::new(), |targets, directive| {
            if directive.target.is_empty() {
                targets.with_default(directive.level)
            } else {
                targets.with_target(directive.place(), directive.level)
            }
        })
    }
}

impl fmt::Display for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, Directive { target, level }) in self.0.iter().enumerate() {
            let comma = if position > 0 { "," } else { "" };
            if target.is_empty() {
                write!(f, "{comma}{level}")?;
            } else {
                write!(f, "{comma}{target}={level}")?;
            }
        }
        Ok(())
    }
}

impl Directive {
    /// The target's name in this program: what is written for the incumbent means the same place here.
    fn place(&self) -> String {
        match self.target.strip_prefix("ztunnel") {
            Some(rest) if rest.is_empty() || rest.starts_with("::") => format!("warren{rest}"),
            _ => self.target.clone(),
        }
    }
}

impl FromStr for Directive {
    type Err = NoDirective;

    fn from_str(part: &str) -> Result<Self, NoDirective> {
        let wrong = || NoDirective(part.to_string());
        if let Some(level) = level(part) {
            let target = String::new();
            return Ok(Self { target, level });
        }
        let (target, word) = part
            .split_once('=')
            .or_else(|| part.rsplit_once(':'))
            .ok_or_else(wrong)?;
        if !is_target(target) {
            return Err(wrong());
        }
        Ok(Self {
            target: target.to_string(),
            level: level(word).ok_or_else(wrong)?,
        })
    }
}

fn parts(text: &str) -> impl Iterator<Item = &str> {
    text.split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty())
}

fn level(word: &str) -> Option<LevelFilter> {
    Some(match &*word.to_ascii_lowercase() {
        "off" => LevelFilter::OFF,
        "error" => LevelFilter::ERROR,
        "warn" => LevelFilter::WARN,
        "info" => LevelFilter::INFO,
        "debug" => LevelFilter::DEBUG,
        "trace" => LevelFilter::TRACE,
        _ => return None,
    })
}

/// Whether a text can name a target: words between `::`.
fn is_target(text: &str) -> bool {
    let word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    text.split("::")
        .all(|piece| !piece.is_empty() && piece.chars().all(word))
}

#[cfg(test)]
mod tests {
    use tracing::Level;

    use super::*;

    #[test]
    fn nothing_asked_for_is_the_documented_default() {
        let filter = Filter::from_variable("").unwrap();
        assert_eq!(filter.to_string(), "hickory_server::server=off,info");
    }

    #[test]
    fn later_levels_replace_earlier_ones_of_the_same_target() {
        let filter = Filter::from_variable("error, access=off,ztunnel::proxy=warn").unwrap();
        assert_eq!(
            filter.to_string(),
            "hickory_server::server=off,ztunnel::proxy=warn,access=off,error"
        );
        let filter = filter
            .with("warren::proxy:debug,dns=TRACE,warn,warn")
            .unwrap();
        assert_eq!(
            filter.to_string(),
            "hickory_server::server=off,warren::proxy=debug,access=off,dns=trace,warn"
        );
        assert_eq!(filter.with("").unwrap(), filter);
    }

    #[test]
    fn levels_apply_to_the_longest_target_that_fits() {
        let targets = Filter::from_variable("ztunnel::proxy=debug,access=off")
            .unwrap()
            .targets();
        assert!(targets.would_enable("warren::proxy::inbound", &Level::DEBUG));
        assert!(!targets.would_enable("warren::xds", &Level::DEBUG));
        assert!(targets.would_enable("warren::xds", &Level::INFO));
        assert!(!targets.would_enable("access", &Level::ERROR));
        assert!(!targets.would_enable("hickory_server::server", &Level::ERROR));
    }

    #[test]
    fn what_is_no_level_is_refused() {
        for text in [
            "loud",
            "access",
            "access=",
            "access=loud",
            "=debug",
            ":debug",
            "warren::debug",
            "warren:::debug",
            "a b=debug",
            "a[{x}]=debug",
            "info,access=loud",
        ] {
            assert!(Filter::default().with(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_variable_may_name_a_target_alone() {
        let filter = Filter::from_variable("warren::xds").unwrap();
        assert!(filter.to_string().contains("warren::xds=trace"));
        assert!(Filter::from_variable("access=loud").is_err());
        assert!(Filter::from_variable("a b").is_err());
    }
}
