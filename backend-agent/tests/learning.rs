//! Tables and packets write the same knowledge at the same time: it never goes back.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends")]

mod common;

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;

use common::frames::{ACK, Segment, encapsulated};
use common::{ME, MUX, PORT, chain, config, lone_interface, on_new_host, service};
use daisy_agent::datapath::{Datapath, Installed};
use daisy_shared::chain::{Generation, Walk};
use daisy_shared::flow::{FlowV4, bucket_of};
use daisy_shared::service::ServiceId;

const PAST: Ipv4Addr = Ipv4Addr::new(10, 11, 0, 10);
const STEPS: u32 = 30_000;

#[test]
fn knowledge_never_goes_back_while_tables_and_packets_race() {
    on_new_host(|bpffs| {
        lone_interface();
        let config = config(bpffs);
        let id = ServiceId(1);
        let mut tables = Datapath::load(&config).unwrap();
        tables.set_service(&service(1, PORT, 16)).unwrap();
        tables.set_trusted(&[(MUX, 32)]).unwrap();
        let client = (Ipv4Addr::new(203, 0, 113, 1), 7);
        let flow = FlowV4 {
            source: client.0,
            destination: common::VIP,
            source_port: client.1,
            destination_port: PORT,
            protocol: 6,
        };
        let bucket = bucket_of(flow.hash(service(1, PORT, 16).hash_key), 16);
        // Both writers take their generations from here; packets also write what is older by then.
        let next = AtomicU32::new(1);
        let done = AtomicBool::new(false);
        let take_over = || Datapath::load(&config).unwrap();
        let (packets, watched) = (take_over(), take_over());

        thread::scope(|scope| {
            let learning = scope.spawn(|| {
                let inner = Segment::new(client, ACK).to_bytes();
                for _ in 0..STEPS {
                    let generation = Generation(next.fetch_add(1, Ordering::SeqCst));
                    let (visited, to_visit) = (chain(&[]), chain(&[PAST]));
                    let walk = Walk { generation, hops: 0, returned: false, visited, to_visit };
                    packets.test_run(&encapsulated(Some(walk), &inner)).unwrap();
                    let knows = packets.knowledge(id, bucket).unwrap().unwrap();
                    assert!(
                        !generation.is_newer_than(knows.generation),
                        "{generation} taught nothing: {knows:?}"
                    );
                }
            });
            let watching = scope.spawn(|| {
                let mut last = Generation(0);
                let mut changes = 0;
                while !done.load(Ordering::SeqCst) {
                    let Some(knows) = watched.knowledge(id, bucket).unwrap() else { continue };
                    assert!(!last.is_newer_than(knows.generation), "{last} was known, now {knows:?}");
                    // What a packet teaches begins with this agent and ends with the table's owners; a table holds
                    // the past alone. Never a mixture.
                    let expected = [&[PAST][..], &[ME, PAST]];
                    assert!(expected.contains(&&knows.chain[..]), "{knows:?}");
                    changes += u32::from(last != knows.generation);
                    last = knows.generation;
                }
                changes
            });
            for _ in 0..STEPS {
                let generation = Generation(next.fetch_add(1, Ordering::SeqCst));
                let installed = [
                    Installed { bucket, generation, chain: chain(&[PAST]) },
                    Installed {
                        bucket,
                        generation: Generation(generation.0.saturating_sub(9)),
                        chain: chain(&[ME]),
                    },
                ];
                // Its own generation is the newest it can have met or has been overtaken; nine before never is.
                assert!(tables.install(id, &installed).unwrap() <= 1);
            }
            learning.join().unwrap();
            done.store(true, Ordering::SeqCst);
            let changes = watching.join().unwrap();
            assert!(changes > 10, "only {changes} changes were seen: nothing has raced");
        });
        let last = next.load(Ordering::SeqCst) - 1;
        let knows = tables.knowledge(id, bucket).unwrap().unwrap();
        assert_eq!(knows.generation, Generation(last));
        assert!(knows.from_table);
        let counters = tables.counters().unwrap();
        assert_eq!(counters["received"], u64::from(STEPS));
        assert!(counters["learned"] > 0);
    });
}
