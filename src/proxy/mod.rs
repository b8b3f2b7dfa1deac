//! The data path: a flow is accepted, judged, connected, carried and accounted, all on one worker.

mod connections;
pub mod drain;
mod inbound;
mod outbound;
mod passthrough;
mod pipes;
pub mod pod;
mod pod_dns;
pub mod pods;
mod proxy_protocol;
mod relay;
pub mod worker;

#[cfg(test)]
mod tests {
    /// The size of what a function's future keeps while it waits.
    fn size<A, B, C, F>(_: impl FnOnce(A, B, C) -> F) -> usize {
        std::mem::size_of::<F>()
    }

    #[test]
    fn the_futures_of_flows_are_small() {
        let sizes = [
            ("outbound", size(super::outbound::serve)),
            ("passthrough", size(super::passthrough::serve)),
            ("tunnel", size(super::inbound::serve)),
            ("stream", size(super::inbound::serve_stream)),
        ];
        eprintln!("{sizes:?}");
    }
}
