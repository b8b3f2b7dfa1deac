//! The expectations of a demonstration: said, checked, counted.

use super::say::say;

/// What was expected so far.
#[derive(Debug, Default)]
pub struct Story {
    checked: usize,
    failed: usize,
}

impl Story {
    /// Says whether an expectation was met.
    pub fn check(&mut self, what: &str, met: bool) {
        self.checked += 1;
        self.failed += usize::from(!met);
        say!("  {} {what}", if met { "[ok]" } else { "[FAILED]" });
    }

    pub fn checked(&self) -> usize {
        self.checked
    }

    pub fn failed(&self) -> usize {
        self.failed
    }
}

/// The last access-log line of a flow between two pods.
pub fn access_line(
    lines: &[String],
    direction: &str,
    client: &str,
    server: &str,
) -> Option<String> {
    let parts = [
        "connection complete".to_owned(),
        format!("direction=\"{direction}\""),
        format!("src.workload=\"{client}\""),
        format!("dst.workload=\"{server}\""),
    ];
    lines
        .iter()
        .rfind(|line| parts.iter().all(|part| line.contains(part)))
        .cloned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_of_a_flow_is_found_by_its_pods_and_direction() {
        let line = |direction: &str, server: &str| {
            format!(
                "t\tinfo\taccess\tconnection complete\tsrc.workload=\"c\" dst.workload=\"{server}\" direction=\"{direction}\""
            )
        };
        let lines = [
            line("outbound", "s"),
            line("inbound", "s"),
            line("inbound", "other"),
        ];
        assert_eq!(
            access_line(&lines, "inbound", "c", "s"),
            Some(lines[1].clone())
        );
        assert_eq!(access_line(&lines, "inbound", "x", "s"), None);
    }

    #[test]
    fn failures_are_counted() {
        let mut story = Story::default();
        story.check("met, for this test", true);
        story.check("not met, for this test", false);
        assert_eq!((story.checked(), story.failed()), (2, 1));
    }
}
