//! Timestamps as text.

use std::cell::Cell;
use std::time::{SystemTime, UNIX_EPOCH};

thread_local! {
    /// A second since the epoch and its text: most lines are of the same second as the one before.
    static SECOND: Cell<(u64, [u8; 19])> = const { Cell::new((u64::MAX, [0; 19])) };
}

/// Appends a time as `YYYY-MM-DDTHH:MM:SS.ffffffZ`, UTC.
pub fn push_timestamp(text: &mut String, time: SystemTime) {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (mut known, mut second) = SECOND.get();
    if known != since.as_secs() {
        known = since.as_secs();
        second = render(known);
        SECOND.set((known, second));
    }
    // Digits and separators, all of them ASCII.
    text.extend(second.map(char::from));
    let mut micros = *b".000000Z";
    digits(&mut micros[1..7], since.subsec_micros().into());
    text.extend(micros.map(char::from));
}

/// A second since the epoch; years beyond 9999 are not foreseen.
fn render(seconds: u64) -> [u8; 19] {
    let (days, seconds) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let mut text = *b"0000-00-00T00:00:00";
    digits(&mut text[..4], year);
    digits(&mut text[5..7], month);
    digits(&mut text[8..10], day);
    digits(&mut text[11..13], seconds / 3600);
    digits(&mut text[14..16], seconds / 60 % 60);
    digits(&mut text[17..19], seconds % 60);
    text
}

/// Fills a field with a number's last digits.
fn digits(field: &mut [u8], mut number: u64) {
    for digit in field.iter_mut().rev() {
        *digit = b'0' + (number % 10) as u8;
        number /= 10;
    }
}

/// Year, month and day of a number of days since 1970-01-01 (Gregorian calendar).
fn civil(days: u64) -> (u64, u64, u64) {
    // Counted from 0000-03-01, so that the leap day is the last of its year.
    let days = days + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 {
        shifted + 3
    } else {
        shifted - 9
    };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn days_become_dates() {
        let cases = [
            (0, 0, "1970-01-01T00:00:00.000000Z"),
            (951_782_399, 5, "2000-02-28T23:59:59.000005Z"),
            (951_782_400, 0, "2000-02-29T00:00:00.000000Z"),
            (1_767_322_985, 123, "2026-01-02T03:03:05.000123Z"),
            (4_107_542_400, 0, "2100-03-01T00:00:00.000000Z"),
        ];
        for (seconds, micros, expected) in cases {
            let mut text = String::new();
            push_timestamp(
                &mut text,
                UNIX_EPOCH + Duration::from_secs(seconds) + Duration::from_micros(micros),
            );
            assert_eq!(text, expected);
        }
    }
}
