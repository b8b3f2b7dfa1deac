//! The traffic counters by label set: rendered once, then found by what a flow is, without a text.

use std::borrow::Borrow;
use std::cell::RefCell;
use std::collections::HashSet;
use std::collections::hash_map::{DefaultHasher, HashMap};
use std::hash::{Hash, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use hbone::Identity;

use super::flow::{Direction, Facts};
use super::metrics::render;
use crate::mesh::{Service, Workload};

/// So many label sets are counted apart; peers could otherwise invent new ones for ever.
const MOST: usize = 20_000;
/// So many label sets a worker finds again without rendering them.
const KNOWN: usize = 1024;

/// The counters of one label set, shared by all workers.
pub struct Series {
    labels: Box<str>,
    pub opened: AtomicU64,
    pub closed: AtomicU64,
    pub failed: AtomicU64,
    /// Bytes.
    pub from_client: AtomicU64,
    pub from_server: AtomicU64,
}

impl Series {
    fn new(labels: Box<str>) -> Self {
        Self {
            labels,
            opened: AtomicU64::new(0),
            closed: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            from_client: AtomicU64::new(0),
            from_server: AtomicU64::new(0),
        }
    }

    /// The rendered label set.
    pub fn labels(&self) -> &str {
        &self.labels
    }

    /// Counts a flow that was opened.
    pub fn open(&self) {
        self.opened.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a flow that has ended.
    pub fn close(&self, failed: bool) {
        self.closed.fetch_add(1, Ordering::Relaxed);
        self.failed.fetch_add(u64::from(failed), Ordering::Relaxed);
    }

    /// Counts bytes.
    pub fn moved(&self, from_client: u64, from_server: u64) {
        self.from_client.fetch_add(from_client, Ordering::Relaxed);
        self.from_server.fetch_add(from_server, Ordering::Relaxed);
    }
}

/// A series by its labels.
struct ByLabels(Arc<Series>);

impl Borrow<str> for ByLabels {
    fn borrow(&self) -> &str {
        &self.0.labels
    }
}

impl PartialEq for ByLabels {
    fn eq(&self, other: &Self) -> bool {
        self.0.labels == other.0.labels
    }
}

impl Eq for ByLabels {}

impl Hash for ByLabels {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.labels.hash(state);
    }
}

/// Every series of the process.
pub struct SeriesTable {
    /// What tells tables apart in the workers' memories.
    id: u64,
    all: Mutex<HashSet<ByLabels>>,
}

impl Default for SeriesTable {
    fn default() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            all: Mutex::default(),
        }
    }
}

/// What decides a flow's labels. Only where its meaning is told apart by pointers is it remembered.
struct Meaning {
    table: u64,
    source: Weak<Workload>,
    destination: Weak<Workload>,
    service: Weak<Service>,
    source_identity: Option<Identity>,
    direction: Direction,
    mtls: bool,
    flag: &'static str,
}

thread_local! {
    /// The series that this worker's flows had, by the hash of their meaning.
    static SEEN: RefCell<HashMap<u64, (Meaning, Arc<Series>)>> = RefCell::default();
}

impl SeriesTable {
    /// The series of a flow.
    pub fn of(&self, facts: &Facts, flag: &'static str) -> Arc<Series> {
        // What a client says of itself is a text that is new with every flow.
        if facts.source.is_none() && facts.derived.is_some() {
            return self.intern(labels(facts, flag));
        }
        let hash = hash(self.id, facts, flag);
        SEEN.with_borrow_mut(|seen| {
            if let Some((meaning, series)) = seen.get(&hash)
                && meaning.is(self.id, facts, flag)
            {
                return series.clone();
            }
            if seen.len() >= KNOWN {
                seen.retain(|_, (meaning, _)| meaning.is_current());
                if seen.len() >= KNOWN {
                    seen.clear();
                }
            }
            let series = self.intern(labels(facts, flag));
            seen.insert(hash, (Meaning::new(self.id, facts, flag), series.clone()));
            series
        })
    }

    /// All series in the order of their labels.
    pub fn sorted(&self) -> Vec<Arc<Series>> {
        let mut sorted: Vec<_> = self.all().iter().map(|series| series.0.clone()).collect();
        sorted.sort_by(|a, b| a.labels.cmp(&b.labels));
        sorted
    }

    /// How many flows were opened and not closed.
    pub fn live(&self) -> u64 {
        let all = self.all();
        let sum = |counter: fn(&Series) -> &AtomicU64| -> u64 {
            let loaded = all
                .iter()
                .map(|series| counter(&series.0).load(Ordering::Relaxed));
            loaded.sum()
        };
        sum(|series| &series.opened).saturating_sub(sum(|series| &series.closed))
    }

    fn intern(&self, labels: String) -> Arc<Series> {
        let mut all = self.all();
        if let Some(known) = all.get(&*labels) {
            return known.0.clone();
        }
        let labels = if all.len() < MOST {
            labels
        } else {
            // One more for everything that there is no room for.
            let reporter = labels.split(',').next().unwrap_or_default();
            let rest = format!("{reporter},source_workload=\"other\"");
            if let Some(known) = all.get(&*rest) {
                return known.0.clone();
            }
            rest
        };
        let series = Arc::new(Series::new(labels.into()));
        all.insert(ByLabels(series.clone()));
        series
    }

    fn all(&self) -> MutexGuard<'_, HashSet<ByLabels>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn address<T>(of: Option<&Arc<T>>) -> *const T {
    of.map_or(std::ptr::null(), Arc::as_ptr)
}

fn weak<T>(of: Option<&Arc<T>>) -> Weak<T> {
    of.map_or_else(Weak::new, Arc::downgrade)
}

/// Whether a remembered pointer is the one that is there now. Its allocation is kept, so the place cannot be another's.
fn is_same<T>(known: &Weak<T>, now: Option<&Arc<T>>) -> bool {
    match now {
        Some(now) => std::ptr::eq(known.as_ptr(), Arc::as_ptr(now)),
        None => known.ptr_eq(&Weak::new()),
    }
}

fn hash(table: u64, facts: &Facts, flag: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    let parts = (
        address(facts.source.as_ref()),
        address(facts.destination.as_ref()),
        address(facts.service.as_ref()),
    );
    let kind = (table, facts.direction as u8, facts.mtls, flag.len());
    (parts, kind, &facts.source_identity).hash(&mut hasher);
    hasher.finish()
}

impl Meaning {
    fn new(table: u64, facts: &Facts, flag: &'static str) -> Self {
        Self {
            table,
            source: weak(facts.source.as_ref()),
            destination: weak(facts.destination.as_ref()),
            service: weak(facts.service.as_ref()),
            source_identity: facts.source_identity.clone(),
            direction: facts.direction,
            mtls: facts.mtls,
            flag,
        }
    }

    fn is(&self, table: u64, facts: &Facts, flag: &str) -> bool {
        self.table == table
            && self.direction == facts.direction
            && self.mtls == facts.mtls
            && self.flag == flag
            && is_same(&self.source, facts.source.as_ref())
            && is_same(&self.destination, facts.destination.as_ref())
            && is_same(&self.service, facts.service.as_ref())
            && self.source_identity == facts.source_identity
    }

    /// Whether all that it names is still of the mesh.
    fn is_current(&self) -> bool {
        let gone = |known: bool, strong: usize| known && strong == 0;
        !(gone(
            !self.source.ptr_eq(&Weak::new()),
            self.source.strong_count(),
        ) || gone(
            !self.destination.ptr_eq(&Weak::new()),
            self.destination.strong_count(),
        ) || gone(
            !self.service.ptr_eq(&Weak::new()),
            self.service.strong_count(),
        ))
    }
}

/// The traffic metrics' labels of a flow.
fn labels(facts: &Facts, flag: &str) -> String {
    let derived = facts.derived.as_deref();
    let baggage_name = told(derived.map(|derived| &derived.workload_name));
    let (source, destination, service) = (
        facts.source.as_deref(),
        facts.destination.as_deref(),
        facts.service.as_deref(),
    );
    let from =
        |known: fn(&crate::mesh::Workload) -> &str, otherwise| source.map_or(otherwise, known);
    let to = |known: fn(&crate::mesh::Workload) -> &str| destination.map_or("", known);
    let of = |known: fn(&crate::mesh::Service) -> &str| service.map_or("", known);
    let revision = told(derived.map(|derived| &derived.revision));
    let labels = [
        ("reporter", facts.direction.reporter()),
        ("source_workload", from(|w| &w.workload_name, baggage_name)),
        (
            "source_canonical_service",
            from(
                |w| &w.canonical_name,
                told(derived.map(|d| &d.service_name)),
            ),
        ),
        (
            "source_canonical_revision",
            from(|w| &w.canonical_revision, revision),
        ),
        (
            "source_workload_namespace",
            from(|w| &w.namespace, told(derived.map(|d| &d.namespace))),
        ),
        (
            "source_principal",
            facts
                .source_identity
                .as_ref()
                .map_or("", |identity| identity.as_str()),
        ),
        ("source_app", from(|w| &w.canonical_name, baggage_name)),
        ("source_version", from(|w| &w.canonical_revision, revision)),
        (
            "source_cluster",
            from(|w| &w.cluster_id, told(derived.map(|d| &d.cluster))),
        ),
        ("destination_service", of(|s| &s.hostname)),
        ("destination_service_namespace", of(|s| &s.namespace)),
        ("destination_service_name", of(|s| &s.name)),
        ("destination_workload", to(|w| &w.workload_name)),
        ("destination_canonical_service", to(|w| &w.canonical_name)),
        (
            "destination_canonical_revision",
            to(|w| &w.canonical_revision),
        ),
        ("destination_workload_namespace", to(|w| &w.namespace)),
        ("destination_principal", to(|w| w.identity.as_str())),
        ("destination_app", to(|w| &w.canonical_name)),
        ("destination_version", to(|w| &w.canonical_revision)),
        ("destination_cluster", to(|w| &w.cluster_id)),
        ("request_protocol", "tcp"),
        ("response_flags", flag),
        (
            "connection_security_policy",
            if facts.mtls { "mutual_tls" } else { "unknown" },
        ),
        (
            "source_region",
            from(|w| &w.locality.region, told(derived.map(|d| &d.region))),
        ),
        (
            "source_zone",
            from(|w| &w.locality.zone, told(derived.map(|d| &d.zone))),
        ),
        ("destination_region", to(|w| &w.locality.region)),
        ("destination_zone", to(|w| &w.locality.zone)),
    ];
    render(&labels.map(|(name, value)| (name, if value.is_empty() { "unknown" } else { value })))
}

/// A part of a baggage, empty when it is not there.
pub(super) fn told(value: Option<&Option<String>>) -> &str {
    value.and_then(|value| value.as_deref()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use hbone::Baggage;

    use super::*;
    use crate::mesh::testing::{pod, service};

    fn facts(direction: Direction) -> Facts {
        Facts::new(
            direction,
            ([10, 0, 0, 1], 1).into(),
            ([10, 0, 0, 2], 2).into(),
        )
    }

    #[test]
    fn a_label_set_is_rendered_once_and_found_again() {
        let table = SeriesTable::default();
        let mut flow = facts(Direction::Outbound);
        flow.source = Some(Arc::new(pod("a", "x", "10.0.0.1")));
        flow.service = Some(Arc::new(service("b", "web", "10.96.0.1")));
        let first = table.of(&flow, "-");
        assert!(Arc::ptr_eq(&first, &table.of(&flow, "-")));
        for flag in ["DENY", "CONNECT"] {
            assert!(!Arc::ptr_eq(&first, &table.of(&flow, flag)));
        }
        // A new record of the same workload has the same labels.
        flow.source = Some(Arc::new(pod("a", "x", "10.0.0.1")));
        assert!(Arc::ptr_eq(&first, &table.of(&flow, "-")));
        flow.mtls = true;
        assert!(!Arc::ptr_eq(&first, &table.of(&flow, "-")));
        // Another table of the same thread is not confused with it.
        let other = SeriesTable::default();
        assert!(!Arc::ptr_eq(&table.of(&flow, "-"), &other.of(&flow, "-")));
        assert_eq!(table.sorted().len(), 4);
    }

    #[test]
    fn what_clients_say_of_themselves_is_told_apart() {
        let table = SeriesTable::default();
        let mut flow = facts(Direction::Inbound);
        for name in ["x", "y", "x"] {
            let baggage = Baggage::parse(&format!("service.name={name}"));
            flow.derived = Some(Box::new(baggage));
            let series = table.of(&flow, "-");
            assert!(
                series
                    .labels()
                    .contains(&format!("source_canonical_service=\"{name}\""))
            );
        }
        assert_eq!(table.sorted().len(), 2);
    }

    #[test]
    fn invented_label_sets_are_bounded() {
        let table = SeriesTable::default();
        let mut flow = facts(Direction::Inbound);
        for number in 0..MOST + 50 {
            flow.derived = Some(Box::new(Baggage::parse(&format!("service.name=s{number}"))));
            table.of(&flow, "-").open();
        }
        let all = table.sorted();
        assert_eq!(all.len(), MOST + 1);
        let other = all
            .iter()
            .find(|series| series.labels().contains("\"other\""))
            .unwrap();
        assert_eq!(
            other.labels(),
            "reporter=\"destination\",source_workload=\"other\""
        );
        assert_eq!(other.opened.load(Ordering::Relaxed), 50);
    }

    #[test]
    fn a_worker_remembers_a_bounded_number() {
        let table = SeriesTable::default();
        let mut flow = facts(Direction::Outbound);
        for number in 0..3 * KNOWN {
            flow.source = Some(Arc::new(pod("a", &format!("p{number}"), "10.0.0.1")));
            table.of(&flow, "-");
        }
        SEEN.with_borrow(|seen| assert!(seen.len() <= KNOWN));
    }
}
