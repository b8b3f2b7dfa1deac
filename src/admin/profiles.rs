//! The endpoints of the profiles (`proxy.md §1.7`).

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::task::spawn_blocking;

use super::http::{Reply, Request};
use crate::profile::cpu::{self, CpuError};
use crate::profile::heap;

const SECONDS: RangeInclusive<u32> = 1..=300;
const FREQUENCY: RangeInclusive<u32> = 1..=1000;

/// `/debug/pprof/profile`: a CPU profile of as long as is asked for.
pub async fn cpu(request: &Request) -> Reply {
    let asked = number(request, "seconds", 10, SECONDS)
        .and_then(|seconds| Ok((seconds, number(request, "frequency", 100, FREQUENCY)?)));
    let (seconds, frequency) = match asked {
        Ok(asked) => asked,
        Err(refusal) => return refusal,
    };
    let end = End::default();
    let stop = end.0.clone();
    let length = Duration::from_secs(seconds.into());
    match spawn_blocking(move || cpu::record(length, frequency, &stop)).await {
        Ok(Ok(body)) => Reply {
            status: 200,
            content_type: None,
            content_encoding: None,
            body,
        },
        Ok(Err(error @ CpuError::Busy)) => Reply::text(409, format!("{error}\n")),
        Ok(Err(error)) => failure(&error),
        Err(error) => failure(&error),
    }
}

/// `/debug/pprof/heap`: who holds the memory that was allocated since the activation.
pub async fn heap() -> Reply {
    match spawn_blocking(heap::profile).await {
        Ok(Ok(body)) => Reply::of("application/octet-stream", body),
        Ok(Err(error)) => failure(&error),
        Err(error) => failure(&error),
    }
}

/// `/debug/pprof/heap/profiling`: switches the sampling of allocations.
pub fn heap_profiling(request: &Request) -> Reply {
    let asked = request.parameter("activate").unwrap_or_default();
    let Ok(active) = asked.parse() else {
        let refusal = format!("invalid activate value {asked:?}; expected true or false\n");
        return Reply::text(400, refusal);
    };
    match heap::activate(active) {
        Ok(active) => Reply::text(200, format!("heap profiling active: {active}\n")),
        Err(error) => failure(&error),
    }
}

/// Ends a recording whose requester is gone.
#[derive(Default)]
struct End(Arc<AtomicBool>);

impl Drop for End {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn failure(error: &impl Display) -> Reply {
    Reply::text(500, error.to_string())
}

/// A parameter that must be within a range, or what to answer if it is not.
fn number(
    request: &Request,
    name: &str,
    otherwise: u32,
    range: RangeInclusive<u32>,
) -> Result<u32, Reply> {
    let value = request
        .parameter(name)
        .map_or(Some(otherwise), |value| value.parse().ok());
    value.filter(|value| range.contains(value)).ok_or_else(|| {
        let (least, most) = (range.start(), range.end());
        let refusal = format!("invalid {name} value; expected {least}-{most}\n");
        Reply::text(400, refusal)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(query: &str) -> Request {
        Request {
            method: "GET".into(),
            query: query.into(),
            ..Request::default()
        }
    }

    fn refusal(reply: Reply) -> (u16, String) {
        (reply.status, String::from_utf8(reply.body).unwrap())
    }

    #[tokio::test]
    async fn what_is_out_of_range_is_refused() {
        for seconds in ["0", "301", "-1", "1.5", "many", "", "4294967297"] {
            let query = format!("seconds={seconds}&frequency=1");
            let refused = refusal(cpu(&request(&query)).await);
            let text = "invalid seconds value; expected 1-300\n";
            assert_eq!(refused, (400, text.to_string()), "{seconds}");
        }
        for frequency in ["0", "1001", "x"] {
            let query = format!("seconds=1&frequency={frequency}");
            let refused = refusal(cpu(&request(&query)).await);
            let text = "invalid frequency value; expected 1-1000\n";
            assert_eq!(refused, (400, text.to_string()), "{frequency}");
        }
    }

    #[test]
    fn the_switch_is_true_or_false() {
        for (query, value) in [
            ("activate=on", "on"),
            ("activate=TRUE", "TRUE"),
            ("activate=", ""),
            ("", ""),
        ] {
            let text = format!("invalid activate value \"{value}\"; expected true or false\n");
            assert_eq!(refusal(heap_profiling(&request(query))), (400, text));
        }
    }
}
