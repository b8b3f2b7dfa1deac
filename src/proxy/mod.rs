//! The data path: a flow is accepted, judged, connected, carried and accounted, all on one worker.

pub mod budget;
mod connections;
pub mod drain;
mod inbound;
mod outbound;
mod passthrough;
mod pipes;
pub mod pod;
mod pod_dns;
pub mod pods;
pub mod proxy_protocol;
mod rankings;
mod relay;
mod socks5;
pub mod worker;

/// A connection that a listener took.
struct Accepted {
    socket: tokio::net::TcpStream,
    client: std::net::SocketAddr,
    /// Counts it as open, and its place in the budgets, until dropped.
    held: (crate::telemetry::OpenSocket, budget::Place),
}

/// Why a flow came to nothing.
enum Refusal {
    /// Before enough was known of it to count it as opened.
    Early(crate::telemetry::FlowError),
    Failed(crate::telemetry::FlowError),
}

impl crate::telemetry::Flow {
    /// Logs why the flow came to nothing.
    fn refuse(self, refusal: Refusal) {
        match refusal {
            Refusal::Early(error) => self.early_deny(&error),
            Refusal::Failed(error) => self.finish(Err(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    /// The size of what a function's future keeps while it waits, in bytes.
    fn size<A, B, F>(_: impl FnOnce(A, B) -> F) -> usize {
        std::mem::size_of::<F>()
    }

    fn size_of_three<A, B, C, F>(_: impl FnOnce(A, B, C) -> F) -> usize {
        std::mem::size_of::<F>()
    }

    #[test]
    fn the_futures_of_flows_are_small() {
        let sizes = [
            ("outbound", size(super::outbound::serve)),
            ("passthrough", size(super::passthrough::serve)),
            ("tunnel", size(super::inbound::serve)),
            ("stream", size_of_three(super::inbound::serve_stream)),
        ];
        for (name, size) in sizes {
            assert!(size <= 672, "{name} keeps {size} bytes");
        }
    }
}
