//! One flow's record: made when it is accepted, filled in as more is learnt, accounted exactly once.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hbone::{Baggage, Counters, Identity};
use tracing::Level;

use super::access::{self, Line, Millis};
use super::log;
use super::metrics::{Labels, Telemetry, told};
use super::sink::Sink;
use crate::mesh::{Service, Workload};

/// Which side of a flow this node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    Inbound,
    Outbound,
}

impl Direction {
    fn as_str(self) -> &'static str {
        match self {
            Self::Inbound => "inbound",
            Self::Outbound => "outbound",
        }
    }

    /// The `reporter` label.
    pub fn reporter(self) -> &'static str {
        match self {
            Self::Inbound => "destination",
            Self::Outbound => "source",
        }
    }
}

/// Why a flow failed: for the access log, and the flag for the metrics.
#[derive(Clone, Debug)]
pub struct FlowError {
    pub text: String,
    pub flag: &'static str,
}

/// What is known of a flow's ends.
pub(super) struct Facts {
    pub direction: Direction,
    pub src: SocketAddr,
    pub dst: SocketAddr,
    pub source: Option<Arc<Workload>>,
    /// What the client says of itself.
    pub derived: Option<Baggage>,
    pub destination: Option<Arc<Workload>>,
    pub service: Option<Arc<Service>>,
    pub hbone_addr: Option<String>,
    pub mtls: bool,
    /// Who the source proved to be.
    pub source_identity: Option<Identity>,
}

/// A flow's record. Dropping it without `finish` accounts the flow as cut by a drain.
pub struct Flow {
    facts: Facts,
    telemetry: Arc<Telemetry>,
    start: Instant,
    live: Option<Rc<Live>>,
    /// What the local workload has sent and received.
    pub counters: Rc<Counters>,
}

/// An opened flow whose bytes the metrics follow.
struct Live {
    labels: Labels,
    direction: Direction,
    telemetry: Arc<Telemetry>,
    counters: Rc<Counters>,
    accounted: Cell<(u64, u64)>,
    slot: Cell<usize>,
}

thread_local! {
    static LIVE: RefCell<Vec<Rc<Live>>> = const { RefCell::new(Vec::new()) };
}

/// Brings the byte metrics of this thread's open flows up to date.
pub fn settle() {
    LIVE.with_borrow(|live| live.iter().for_each(|flow| flow.settle()));
}

impl Live {
    fn settle(&self) {
        let now = (self.counters.sent.get(), self.counters.received.get());
        let before = self.accounted.replace(now);
        let (sent, received) = (now.0 - before.0, now.1 - before.1);
        // The metrics count from the client's and the server's side, the flow from the local workload's.
        let (from_client, from_server) = match self.direction {
            Direction::Outbound => (sent, received),
            Direction::Inbound => (received, sent),
        };
        if from_client + from_server > 0 {
            self.telemetry.moved(&self.labels, from_client, from_server);
        }
    }
}

impl Flow {
    /// The record of a connection that was just accepted.
    pub fn new(
        direction: Direction,
        src: SocketAddr,
        dst: SocketAddr,
        telemetry: Arc<Telemetry>,
    ) -> Self {
        Self {
            facts: Facts {
                direction,
                src,
                dst,
                source: None,
                derived: None,
                destination: None,
                service: None,
                hbone_addr: None,
                mtls: false,
                source_identity: None,
            },
            telemetry,
            start: Instant::now(),
            live: None,
            counters: Rc::default(),
        }
    }

    /// The workload that the flow comes from.
    pub fn source(&mut self, workload: Arc<Workload>) {
        self.facts.source = Some(workload);
    }

    /// What the client says of itself, for when its workload is not known.
    pub fn derived_source(&mut self, baggage: Baggage) {
        self.facts.derived = Some(baggage);
    }

    /// The workload that the flow goes to.
    pub fn destination(&mut self, workload: Arc<Workload>) {
        self.facts.destination = Some(workload);
    }

    /// The service that was meant.
    pub fn service(&mut self, service: Arc<Service>) {
        self.facts.service = Some(service);
    }

    /// What the CONNECT asks for.
    pub fn hbone_addr(&mut self, authority: String) {
        self.facts.hbone_addr = Some(authority);
    }

    /// Where the flow really goes, once that is known.
    pub fn dst_addr(&mut self, address: SocketAddr) {
        self.facts.dst = address;
    }

    /// The flow is carried over mutual TLS; `source` is who its source proves to be.
    pub fn mtls(&mut self, source: Option<Identity>) {
        self.facts.mtls = true;
        self.facts.source_identity = source;
    }

    /// Everything is known: counts the flow as opened.
    pub fn open(&mut self) {
        let labels = Labels::new(&self.facts, "-");
        self.telemetry.opened(&labels);
        let live = Rc::new(Live {
            labels,
            direction: self.facts.direction,
            telemetry: self.telemetry.clone(),
            counters: self.counters.clone(),
            accounted: Cell::new((0, 0)),
            slot: Cell::new(0),
        });
        LIVE.with_borrow_mut(|flows| {
            live.slot.set(flows.len());
            flows.push(live.clone());
        });
        self.live = Some(live);
        if tracing::enabled!(target: "access", Level::DEBUG) {
            let mut line = Line::new(log::is_json(), &Level::DEBUG, "connection opened");
            self.facts.write(&mut line);
            Sink::process().line(&line.end());
        }
    }

    /// The flow is over.
    pub fn finish(mut self, result: Result<(), FlowError>) {
        match result {
            Ok(()) => self.account(None, "-"),
            Err(error) => self.account(Some(&error.text), error.flag),
        }
    }

    /// The connection is refused before it could be told who wants what.
    pub fn early_deny(self, error: &str) {
        access::early_deny(
            self.facts.src,
            self.facts.dst,
            self.facts.direction.as_str(),
            error,
        );
    }

    fn account(&mut self, error: Option<&str>, flag: &'static str) {
        let Some(live) = self.live.take() else { return };
        live.settle();
        LIVE.with_borrow_mut(|flows| {
            let slot = live.slot.get();
            flows.swap_remove(slot);
            if let Some(moved) = flows.get(slot) {
                moved.slot.set(slot);
            }
        });
        let relabelled;
        let labels = if flag == "-" {
            &live.labels
        } else {
            relabelled = Labels::new(&self.facts, flag);
            &relabelled
        };
        self.telemetry.closed(labels, flag != "-");
        let level = if error.is_some() {
            Level::ERROR
        } else {
            Level::INFO
        };
        let enabled = match error {
            Some(_) => tracing::enabled!(target: "access", Level::ERROR),
            None => tracing::enabled!(target: "access", Level::INFO),
        };
        if enabled {
            let line = self.complete(log::is_json(), &level, self.start.elapsed(), error);
            Sink::process().line(&line);
        }
    }

    fn complete(
        &self,
        json: bool,
        level: &Level,
        duration: Duration,
        error: Option<&str>,
    ) -> String {
        let mut line = Line::new(json, level, "connection complete");
        self.facts.write(&mut line);
        line.number("bytes_sent", self.counters.sent.get());
        line.number("bytes_recv", self.counters.received.get());
        line.text("duration", &Millis(duration).to_string());
        if let Some(error) = error {
            line.text("error", error);
        }
        line.end()
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        self.account(Some("connection closed due to connection drain"), "-");
    }
}

impl Facts {
    /// The fields from `src.addr` to `direction`.
    fn write(&self, line: &mut Line) {
        let derived = self.derived.as_ref();
        line.address("src.addr", self.src);
        match &self.source {
            Some(source) => {
                line.text("src.workload", &source.name);
                line.text("src.namespace", &source.namespace);
            }
            None => {
                line.text(
                    "src.workload",
                    told(derived.map(|derived| &derived.service_name)),
                );
                line.text(
                    "src.namespace",
                    told(derived.map(|derived| &derived.namespace)),
                );
            }
        }
        if let Some(identity) = self.source_identity.as_ref().filter(|_| self.mtls) {
            line.text("src.identity", identity.as_str());
        }
        match &self.source {
            Some(source) => line.text("src.cluster", &source.cluster_id),
            None => line.text("src.cluster", told(derived.map(|derived| &derived.cluster))),
        }
        line.address("dst.addr", self.dst);
        if let Some(authority) = &self.hbone_addr {
            line.address("dst.hbone_addr", authority);
        }
        if let Some(service) = &self.service {
            line.text("dst.service", &service.hostname);
        }
        if let Some(destination) = &self.destination {
            line.text("dst.workload", &destination.name);
            line.text("dst.namespace", &destination.namespace);
            if self.mtls {
                line.text("dst.identity", destination.identity.as_str());
            }
            line.text("dst.cluster", &destination.cluster_id);
        }
        line.text("direction", self.direction.as_str());
    }
}

#[cfg(test)]
#[path = "flow_tests.rs"]
mod tests;
