//! One flow's record: made when it is accepted, filled in as more is learnt, accounted exactly once.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hbone::{Baggage, Counters, Identity, Ledger, OpenError};
use slab::Slab;
use tracing::Level;

use super::access::{self, Line, Millis};
use super::log;
use super::metrics::Telemetry;
use super::reason::Reason;
use super::series::{Series, told};
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

/// Why a flow failed: in words, and as a code.
#[derive(Clone, Debug)]
pub struct FlowError {
    pub text: String,
    pub reason: Reason,
    /// `response_flags` of the traffic metrics.
    pub flag: &'static str,
}

impl FlowError {
    /// An error with the flag of its reason.
    pub fn new(reason: Reason, text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            reason,
            flag: reason.flag(),
        }
    }
}

impl From<OpenError> for FlowError {
    fn from(error: OpenError) -> Self {
        let told = Self::new(Reason::from(&error), error.to_string());
        match error {
            // Whatever the peer's reason is, for the client's side the peer refused.
            OpenError::Status(..) => Self {
                flag: Reason::Refused.flag(),
                ..told
            },
            _ => told,
        }
    }
}

/// The `response_flags` of a flow that did not fail.
const NO_FLAG: &str = "-";

/// What is known of a flow's ends.
pub(super) struct Facts {
    pub direction: Direction,
    pub src: SocketAddr,
    pub dst: SocketAddr,
    pub source: Option<Arc<Workload>>,
    /// What the client says of itself.
    pub derived: Option<Box<Baggage>>,
    pub destination: Option<Arc<Workload>>,
    pub service: Option<Arc<Service>>,
    pub hbone_addr: Option<String>,
    pub mtls: bool,
    /// Who the source proved to be.
    pub source_identity: Option<Identity>,
}

/// A flow's record. Dropping it without `finish` accounts the flow as cut by a drain.
pub struct Flow(Box<Record>);

struct Record {
    facts: Facts,
    telemetry: Arc<Telemetry>,
    start: Instant,
    /// Its place among the live flows once it is open.
    live: Option<usize>,
    counters: Rc<Counters>,
}

/// An opened flow whose bytes the metrics follow.
struct Live {
    series: Arc<Series>,
    direction: Direction,
    counters: Rc<Counters>,
    /// Sent and received bytes that are in the metrics.
    accounted: (u64, u64),
}

thread_local! {
    static LIVE: RefCell<Slab<Live>> = const { RefCell::new(Slab::new()) };
}

/// Brings the byte metrics of this thread's open flows up to date.
pub fn settle() {
    LIVE.with_borrow_mut(|live| live.iter_mut().for_each(|(_, flow)| flow.settle()));
}

impl Live {
    fn settle(&mut self) {
        let now = (self.counters.sent.get(), self.counters.received.get());
        let before = std::mem::replace(&mut self.accounted, now);
        let (sent, received) = (now.0 - before.0, now.1 - before.1);
        // The metrics count from the client's and the server's side, the flow from the local workload's.
        let (from_client, from_server) = match self.direction {
            Direction::Outbound => (sent, received),
            Direction::Inbound => (received, sent),
        };
        if from_client + from_server > 0 {
            self.series.moved(from_client, from_server);
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
        Self(Box::new(Record {
            facts: Facts::new(direction, src, dst),
            telemetry,
            start: Instant::now(),
            live: None,
            counters: Rc::default(),
        }))
    }

    /// Has the flow's waiting bytes added up there; before it is carried.
    pub fn charge(&mut self, ledger: &Arc<Ledger>) {
        self.0.counters = Rc::new(Counters::of(ledger.clone()));
    }

    /// What the local workload has sent and received.
    pub fn counters(&self) -> &Rc<Counters> {
        &self.0.counters
    }

    /// The workload that the flow comes from.
    pub fn source(&mut self, workload: Arc<Workload>) {
        self.0.facts.source = Some(workload);
    }

    /// What the client says of itself, for when its workload is not known.
    pub fn derived_source(&mut self, baggage: Baggage) {
        self.0.facts.derived = Some(Box::new(baggage));
    }

    /// The workload that the flow goes to.
    pub fn destination(&mut self, workload: Arc<Workload>) {
        self.0.facts.destination = Some(workload);
    }

    /// The service that was meant.
    pub fn service(&mut self, service: Arc<Service>) {
        self.0.facts.service = Some(service);
    }

    /// What the CONNECT asks for.
    pub fn hbone_addr(&mut self, authority: String) {
        self.0.facts.hbone_addr = Some(authority);
    }

    /// Where the flow really goes, once that is known.
    pub fn dst_addr(&mut self, address: SocketAddr) {
        self.0.facts.dst = address;
    }

    /// The flow is carried over mutual TLS; `source` is who its source proves to be.
    pub fn mtls(&mut self, source: Option<Identity>) {
        self.0.facts.mtls = true;
        self.0.facts.source_identity = source;
    }

    /// Counts the flow as opened, unless it is.
    pub fn open_now(&mut self) {
        if self.0.live.is_none() {
            self.open();
        }
    }

    /// Everything is known: counts the flow as opened.
    pub fn open(&mut self) {
        let record = &mut *self.0;
        let series = record.telemetry.traffic.of(&record.facts, NO_FLAG);
        series.open();
        let live = Live {
            series,
            direction: record.facts.direction,
            counters: record.counters.clone(),
            accounted: (0, 0),
        };
        record.live = Some(LIVE.with_borrow_mut(|flows| flows.insert(live)));
        if tracing::enabled!(target: "access", Level::DEBUG) {
            let mut line = Line::new(log::is_json(), &Level::DEBUG, "connection opened");
            record.facts.write(&mut line);
            line.log();
        }
    }

    /// The endpoint could not be reached; the flow is about to be opened to another one.
    pub fn abandon_attempt(&mut self, error: &FlowError) {
        let record = &mut *self.0;
        if let Some(place) = record.live.take() {
            LIVE.with_borrow_mut(|flows| flows.remove(place));
            let telemetry = &record.telemetry;
            telemetry.traffic.of(&record.facts, error.flag).close(true);
            let dst = record.facts.dst;
            tracing::debug!("{dst} failed, trying another endpoint: {}", error.text);
        }
    }

    /// The flow is over.
    pub fn finish(mut self, result: Result<(), FlowError>) {
        match result {
            Ok(()) => self.0.account(None),
            Err(error) => self.0.account(Some(&error)),
        }
    }

    /// The connection is refused before it could be told who wants what.
    pub fn early_deny(self, error: &FlowError) {
        let facts = &self.0.facts;
        let (direction, reason) = (facts.direction, error.reason);
        self.0.telemetry.refused(direction, reason);
        access::early_deny(facts.src, facts.dst, direction.as_str(), error);
    }
}

impl Record {
    fn account(&mut self, error: Option<&FlowError>) {
        let Some(place) = self.live.take() else {
            return;
        };
        let mut live = LIVE.with_borrow_mut(|flows| {
            let live = flows.remove(place);
            if flows.is_empty() {
                // What a burst of flows needed is not kept.
                *flows = Slab::new();
            }
            live
        });
        live.settle();
        match error {
            // The incumbent does not count a flow that a drain cut as failed.
            None | Some(FlowError { flag: NO_FLAG, .. }) => live.series.close(false),
            Some(error) => {
                let series = self.telemetry.traffic.of(&self.facts, error.flag);
                series.close(true);
                self.telemetry.refused(self.facts.direction, error.reason);
            }
        }
        let (level, enabled) = match error {
            Some(_) => (
                Level::ERROR,
                tracing::enabled!(target: "access", Level::ERROR),
            ),
            None => (
                Level::INFO,
                tracing::enabled!(target: "access", Level::INFO),
            ),
        };
        if enabled {
            let duration = self.start.elapsed();
            self.complete(log::is_json(), &level, duration, error).log();
        }
    }

    fn complete(
        &self,
        json: bool,
        level: &Level,
        duration: Duration,
        error: Option<&FlowError>,
    ) -> Line {
        let mut line = Line::new(json, level, "connection complete");
        self.facts.write(&mut line);
        line.number("bytes_sent", self.counters.sent.get());
        line.number("bytes_recv", self.counters.received.get());
        line.quoted("duration", Millis(duration));
        if let Some(error) = error {
            line.text("reason", error.reason.code());
            // Last, as whoever reads these lines expects it.
            line.text("error", &error.text);
        }
        line
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        if self.0.live.is_some() {
            let text = "connection closed due to connection drain";
            self.0.account(Some(&FlowError {
                flag: NO_FLAG,
                ..FlowError::new(Reason::Draining, text)
            }));
        }
    }
}

impl Facts {
    /// Of a connection of which nothing else is known.
    pub fn new(direction: Direction, src: SocketAddr, dst: SocketAddr) -> Self {
        Self {
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
        }
    }

    /// The fields from `src.addr` to `direction`.
    fn write(&self, line: &mut Line) {
        let derived = self.derived.as_deref();
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
