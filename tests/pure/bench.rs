//! What the pure parts of the data path cost: routing, balancing, judging, framing.
//!
//! `cargo bench --bench pure` measures time. `WARREN_COUNT=<case>` runs one case so often as `WARREN_TIMES` says and
//! nothing else, for a tool that counts instructions (`docs/instructions.sh`).

use std::hint::black_box;
use std::net::SocketAddr;
use std::sync::Arc;

use criterion::Criterion;
use hbone::internals::{Connection, Limits, Role};
use warren::mesh::store::AddressResource;
use warren::mesh::testing::{pod, service, serving};
use warren::mesh::{Mesh, Store, Workload, balance, route};
use warren::policy::model::{Action, Match, Scope, StringMatch};
use warren::policy::{Context, Policy};

/// A service of so many endpoints, and the client of its flows.
fn world(endpoints: usize) -> (Arc<Mesh>, Workload) {
    let web = service("b", "web", "10.96.0.1");
    let client = pod("a", "client", "10.0.0.1");
    let mut resources = vec![
        AddressResource::Service(web.clone()),
        AddressResource::Workload(client.clone()),
    ];
    resources.extend((0..endpoints).map(|number| {
        let ip = format!("10.1.{}.{}", number / 256, number % 256);
        AddressResource::Workload(serving(pod("b", &format!("web-{number}"), &ip), &web))
    }));
    let mut store = Store::new("n1");
    store.apply_addresses(resources, &[]);
    store.apply_policies(policies(), &[]);
    store.set_policies_synced();
    (store.snapshot(), client)
}

/// Ten policies for namespace `b` that name a hundred principals; the last names the client.
fn policies() -> Vec<Policy> {
    let named = |number: usize| Match {
        principals: vec![StringMatch::Exact(match number {
            99 => "cluster.local/ns/a/sa/client".into(),
            _ => format!("cluster.local/ns/other/sa/s{number}").into(),
        })],
        ..Match::default()
    };
    let policy = |policy: usize| Policy {
        key: format!("b/p{policy}").into(),
        name: format!("p{policy}").into(),
        namespace: "b".into(),
        scope: Scope::Namespace,
        action: Action::Allow,
        rules: vec![vec![
            (0..10).map(|entry| named(policy * 10 + entry)).collect(),
        ]],
        dry_run: false,
    };
    (0..10).map(policy).collect()
}

fn random() -> impl FnMut(u64) -> u64 {
    let mut state = 1_u64;
    move |bound| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % bound.max(1)
    }
}

/// A name and what is done once.
type Case = (String, Box<dyn FnMut()>);

fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    let (vip, unknown): (SocketAddr, SocketAddr) =
        (([10, 96, 0, 1], 80).into(), ([192, 0, 2, 1], 443).into());
    for endpoints in [10, 1_000, 10_000] {
        let (mesh, client) = world(endpoints);
        let source: SocketAddr = ([10, 0, 0, 1], 40_000).into();
        for (name, target) in [("service", vip), ("unknown", unknown)] {
            let (mesh, client, mut random) = (mesh.clone(), client.clone(), random());
            let decide = move || {
                let route = route::decide(&mesh, &client, source, target, &mut random);
                let _ = black_box(route);
            };
            cases.push((format!("route/{name}/{endpoints}"), Box::new(decide)));
        }
        let mut random = random();
        let pick = move || {
            let key = warren::mesh::testing::key("b", "web");
            let entry = mesh.service_entry(&key);
            let purpose = balance::Purpose::Serve;
            let picked = entry
                .and_then(|entry| balance::pick(&mesh, entry, &client, 80, purpose, &mut random));
            black_box(picked.map(|(endpoint, _)| endpoint.capacity));
        };
        cases.push((format!("balance/{endpoints}"), Box::new(pick)));
    }
    let (mesh, client) = world(1);
    let server = pod("b", "web-0", "10.1.0.0");
    let verdict = move || {
        let context = Context {
            identity: Some(&client.identity),
            src: ([10, 0, 0, 1], 40_000).into(),
            dst: ([10, 1, 0, 0], 8080).into(),
        };
        black_box(mesh.verdict(&server, &context).is_allowed());
    };
    cases.push(("verdict/100 principals".into(), Box::new(verdict)));
    cases.extend(framing());
    cases
}

fn framing() -> Vec<Case> {
    let limits = Limits {
        stream_window: 4 << 20,
        connection_window: 16 << 20,
        frame_size: 1 << 20,
        header_list: 64 << 10,
        streams: 200,
    };
    let (mut client, mut server) = (
        Connection::<()>::new(Role::Client, limits.clone(), 100),
        Connection::<()>::new(Role::Server, limits, 100),
    );
    for _ in 0..3 {
        pass(&mut client, &mut server);
        pass(&mut server, &mut client);
    }
    // A flow whole: CONNECT, 200, 16 KiB there and back, both ends.
    let mut payload = vec![0; 9 + (16 << 10)];
    let flow = move || {
        let place = client.open("10.1.0.0:8080", |encoder| {
            encoder.field("baggage", "k8s.cluster.name=Kubernetes,k8s.namespace.name=a,k8s.deployment.name=client,service.name=client");
            encoder.field("forwarded", "for=\"10.0.0.1:40000\";host=web.b.svc.cluster.local");
            encoder.field("traceparent", "00-0123456789abcdef0123456789abcdef-0123456789abcdef-00");
        });
        let place = place.unwrap_or_default();
        pass(&mut client, &mut server);
        server.answer(0, 200, false, |_| {});
        pass(&mut server, &mut client);
        for end in [false, true] {
            let length = if end { 0 } else { 16 << 10 };
            let size = 9 + length;
            payload[..9].copy_from_slice(&client.data(place, length, end));
            take(&mut server, &payload[..size]);
            server.consumed(0, length);
            payload[..9].copy_from_slice(&server.data(0, length, end));
            take(&mut client, &payload[..size]);
            client.consumed(place, length);
        }
        client.close(place, hbone::Reason::NO_ERROR);
        server.close(0, hbone::Reason::NO_ERROR);
        pass(&mut client, &mut server);
        pass(&mut server, &mut client);
    };
    vec![("frames/a flow of 16 KiB".into(), Box::new(flow))]
}

fn pass(from: &mut Connection<()>, to: &mut Connection<()>) {
    let bytes = std::mem::take(&mut from.control);
    take(to, &bytes);
}

fn take(to: &mut Connection<()>, mut bytes: &[u8]) {
    while let Ok(Some(event)) = to.receive(&mut bytes) {
        black_box(&event);
    }
}

/// What a tool that counts instructions looks at.
#[inline(never)]
fn counted(case: &mut dyn FnMut(), times: usize) {
    for _ in 0..times {
        case();
    }
}

fn main() {
    let mut cases = cases();
    if let Ok(wanted) = std::env::var("WARREN_COUNT") {
        let times = std::env::var("WARREN_TIMES").ok();
        let times: usize = times.and_then(|times| times.parse().ok()).unwrap_or(1);
        for (name, case) in &mut cases {
            if wanted == "list" {
                println!("{name}");
            } else if *name == wanted {
                counted(case, times);
            }
        }
        return;
    }
    let mut criterion = Criterion::default().configure_from_args();
    for (name, mut case) in cases {
        criterion.bench_function(&name, |bencher| bencher.iter(&mut case));
    }
    criterion.final_summary();
}
