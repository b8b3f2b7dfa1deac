//! The grammars of configuration values: booleans, durations, CPU quantities, ports and addresses.

use std::time::Duration;

/// `true` or `false`, nothing else.
pub fn boolean(text: &str) -> Result<bool, String> {
    match text {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => Err("expected true or false".to_string()),
    }
}

/// Items between commas or white space.
pub fn list<T: std::str::FromStr<Err = String>>(text: &str) -> Result<Vec<T>, String> {
    let items = text.split([',', ' ', '\n', '\t']);
    let items = items.filter(|item| !item.is_empty());
    items.map(str::parse).collect()
}

/// The path of `unix:///path` or `unix:/path`.
pub fn unix_socket(text: &str) -> Result<String, String> {
    text.strip_prefix("unix:")
        .map(|rest| rest.strip_prefix("//").unwrap_or(rest))
        .filter(|path| path.starts_with('/') && !path.ends_with('/') && !path.contains(['?', '#']))
        .map(str::to_string)
        .ok_or_else(|| "expected unix:///PATH: only Unix sockets are supported".to_string())
}

/// Seconds per unit of a duration; `None` for a word that is no unit.
fn unit_nanos(unit: &str) -> Option<f64> {
    Some(match unit {
        "ns" => 1.0,
        "us" | "µs" => 1e3,
        "ms" => 1e6,
        "" | "s" => 1e9,
        "m" => 60e9,
        "h" => 3600e9,
        "d" => 86_400e9,
        "w" => 7.0 * 86_400e9,
        "mon" => 30.0 * 86_400e9,
        "y" => 365.0 * 86_400e9,
        _ => return None,
    })
}

/// A duration such as `90s`, `1h30m`, `1h + 30m`, `2*30s` or a bare number of seconds.
pub fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("expected a duration such as 90s, 1h30m or 300, got {text:?}");
    let mut total = 0.0;
    for sum in text.split('+') {
        let mut product: Option<f64> = None;
        for factor in sum.split('*') {
            let (nanos, plain) = sequence(factor.trim()).ok_or_else(wrong)?;
            product = Some(match product {
                None => nanos,
                // One side of a product is a plain number, the other a time.
                Some(left) if plain => left * (nanos / 1e9),
                Some(left) => (left / 1e9) * nanos,
            });
        }
        total += product.ok_or_else(wrong)?;
    }
    let seconds = total / 1e9;
    if !seconds.is_finite() || !(0.0..1e12).contains(&seconds) {
        return Err(wrong());
    }
    Ok(Duration::from_nanos(total as u64))
}

/// Parses `1h30m`: its nanoseconds, and whether it was a bare number.
fn sequence(text: &str) -> Option<(f64, bool)> {
    if text.is_empty() {
        return None;
    }
    let mut rest = text;
    let mut total = 0.0;
    let mut plain = true;
    while !rest.is_empty() {
        let digits = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(rest.len());
        let number: f64 = rest[..digits].parse().ok()?;
        rest = rest[digits..].trim_start();
        let letters = rest
            .find(|c: char| !c.is_alphabetic())
            .unwrap_or(rest.len());
        plain &= letters == 0;
        total += number * unit_nanos(&rest[..letters])?;
        rest = rest[letters..].trim_start();
    }
    Some((total, plain))
}

/// A Kubernetes CPU quantity (`2`, `1.5`, `500m`) rounded up to whole cores.
pub fn cpu_quantity(text: &str) -> Result<usize, String> {
    let wrong = || format!("expected a CPU quantity such as 2, 1.5 or 500m, got {text:?}");
    let cores = match text.strip_suffix('m') {
        Some(millis) => millis.parse::<u32>().map_err(|_| wrong())? as f64 / 1000.0,
        None => text.parse::<f64>().map_err(|_| wrong())?,
    };
    if !cores.is_finite() || !(0.0..=4096.0).contains(&cores) {
        return Err(wrong());
    }
    Ok(cores.ceil() as usize)
}

/// `ZTUNNEL_WORKER_THREADS`: a count, `0` for all cores, or a percentage of them.
pub fn worker_threads(text: &str, cores: usize) -> Result<usize, String> {
    let wrong =
        || format!("expected a number of threads or a percentage such as 50%, got {text:?}");
    if let Some(percent) = text.strip_suffix('%') {
        let percent: f64 = percent.parse().map_err(|_| wrong())?;
        if !(percent > 0.0 && percent <= 100.0) {
            return Err("a percentage of cores must be above 0 and at most 100".to_string());
        }
        return Ok(((cores as f64 * percent / 100.0).ceil() as usize).max(1));
    }
    match text.parse::<u16>().map_err(|_| wrong())? {
        0 => Ok(cores),
        count => Ok(usize::from(count)),
    }
}

/// A number of things of which there must be one.
pub fn count(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err("expected a number above 0".to_string()),
        Ok(count) => Ok(count),
    }
}

/// A number of bytes: `1048576`, `64Mi`, `2G`.
pub fn bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit: u64 = match &text[digits.len()..] {
        "" => 1,
        "k" | "K" => 1000,
        "Ki" => 1 << 10,
        "M" => 1_000_000,
        "Mi" => 1 << 20,
        "G" => 1_000_000_000,
        "Gi" => 1 << 30,
        _ => 0,
    };
    let number: Option<u64> = digits.parse().ok();
    number
        .and_then(|number| number.checked_mul(unit))
        .filter(|bytes| *bytes > 0)
        .ok_or_else(|| "expected bytes, such as 67108864, 64Mi or 2G".to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_follow_the_grammar() {
        for (text, millis) in [
            ("90s", 90_000),
            ("1h30m", 5_400_000),
            ("300", 300_000),
            ("250ms", 250),
            ("1h + 30m", 5_400_000),
            ("2*30s", 60_000),
            ("30s*2", 60_000),
            ("1d", 86_400_000),
            ("0", 0),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for text in ["", "s", "5 parsecs", "-1s", "1h+", "nan", "1e400"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn thread_counts_follow_cores_and_percentages() {
        assert_eq!(worker_threads("0", 8), Ok(8));
        assert_eq!(worker_threads("3", 8), Ok(3));
        assert_eq!(worker_threads("26%", 8), Ok(3));
        assert!(worker_threads("0%", 8).is_err());
        assert!(worker_threads("101%", 8).is_err());
        assert!(worker_threads("many", 8).is_err());
        assert_eq!(cpu_quantity("500m"), Ok(1));
        assert_eq!(cpu_quantity("1.5"), Ok(2));
        assert!(cpu_quantity("x").is_err());
    }
}
