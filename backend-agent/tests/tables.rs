//! The maps: services and their ranges, installing tables, and what survives the daemon.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on ends")]

mod common;

use std::net::Ipv4Addr;

use common::frames::{SYN, Segment, encapsulated};
use common::{ME, MUX, chain, config, known, lone_interface, on_new_host, service};
use daisy_agent::datapath::{Datapath, DatapathError, Installed};
use daisy_shared::chain::Generation;
use daisy_shared::service::ServiceId;

const A: Ipv4Addr = Ipv4Addr::new(10, 11, 0, 10);
const B: Ipv4Addr = Ipv4Addr::new(10, 11, 0, 11);

fn installed(bucket: u32, generation: u32, owners: &[Ipv4Addr]) -> Installed {
    Installed { bucket, generation: Generation(generation), chain: chain(owners) }
}

#[test]
fn a_table_is_installed_and_never_goes_back() {
    on_new_host(|bpffs| {
        lone_interface();
        let mut datapath = Datapath::load(&config(bpffs)).unwrap();
        let id = ServiceId(1);
        datapath.set_service(&service(1, 80, 256)).unwrap();
        assert_eq!(datapath.services(), [id]);
        assert!(datapath.knowledge_of(id).unwrap().iter().all(Option::is_none));

        let table: Vec<Installed> = (0..256).map(|bucket| installed(bucket, 5, &[ME, A])).collect();
        assert_eq!(datapath.install(id, &table).unwrap(), 256);
        assert_eq!(datapath.knowledge(id, 255).unwrap(), Some(known(5, &[ME, A])));

        // Older, the same generation with another chain, newer.
        assert_eq!(datapath.install(id, &[installed(7, 4, &[B])]).unwrap(), 0);
        assert_eq!(datapath.knowledge(id, 7).unwrap(), Some(known(5, &[ME, A])));
        assert_eq!(datapath.install(id, &[installed(7, 5, &[ME])]).unwrap(), 1);
        assert_eq!(datapath.knowledge(id, 7).unwrap(), Some(known(5, &[ME])));
        assert_eq!(datapath.install(id, &[installed(7, 6, &[B, ME]), installed(8, 6, &[])]).unwrap(), 2);
        let all = datapath.knowledge_of(id).unwrap();
        assert_eq!(all.len(), 256);
        assert_eq!(all[6..9], [Some(known(5, &[ME, A])), Some(known(6, &[B, ME])), Some(known(6, &[]))]);

        datapath.forget(id, &[7]).unwrap();
        assert_eq!(datapath.knowledge(id, 7).unwrap(), None);
    });
}

#[test]
fn generations_are_compared_with_wrap_around() {
    on_new_host(|bpffs| {
        lone_interface();
        let mut datapath = Datapath::load(&config(bpffs)).unwrap();
        let id = ServiceId(1);
        datapath.set_service(&service(1, 80, 16)).unwrap();
        assert_eq!(datapath.install(id, &[installed(0, u32::MAX, &[A])]).unwrap(), 1);
        assert_eq!(datapath.install(id, &[installed(0, 1, &[B])]).unwrap(), 1);
        assert_eq!(datapath.install(id, &[installed(0, u32::MAX, &[A])]).unwrap(), 0);
        assert_eq!(datapath.knowledge(id, 0).unwrap(), Some(known(1, &[B])));
    });
}

#[test]
fn ranges_are_given_out_taken_back_and_clean() {
    on_new_host(|bpffs| {
        lone_interface();
        let mut datapath = Datapath::load(&config(bpffs)).unwrap();
        for id in 1..=4 {
            datapath.set_service(&service(id, 80 + id as u16, 1024)).unwrap();
            datapath.install(ServiceId(id), &[installed(9, id, &[A])]).unwrap();
        }
        let error = datapath.set_service(&service(5, 90, 16)).unwrap_err();
        let DatapathError::Capacity { buckets: 16, free: 0, capacity: 4096, .. } = error else {
            panic!("{error}")
        };
        assert!(error.to_string().contains("--bucket-capacity"), "{error}");

        datapath.remove_service(ServiceId(2)).unwrap();
        datapath.remove_service(ServiceId(2)).unwrap();
        assert!(matches!(datapath.knowledge(ServiceId(2), 0), Err(DatapathError::UnknownService(_))));
        datapath.set_service(&service(5, 90, 512)).unwrap();
        datapath.set_service(&service(6, 91, 512)).unwrap();
        assert!(datapath.knowledge_of(ServiceId(5)).unwrap().iter().all(Option::is_none));
        for id in [1, 3, 4] {
            assert_eq!(datapath.knowledge(ServiceId(id), 9).unwrap(), Some(known(id, &[A])));
        }
        // Set again just so: nothing is forgotten. With another key: everything.
        datapath.set_service(&service(1, 81, 1024)).unwrap();
        assert_eq!(datapath.knowledge(ServiceId(1), 9).unwrap(), Some(known(1, &[A])));
        let mut other = service(1, 81, 1024);
        other.hash_key.0[0] ^= 1;
        datapath.set_service(&other).unwrap();
        assert_eq!(datapath.knowledge(ServiceId(1), 9).unwrap(), None);
        // The same address under another number takes its place.
        datapath.set_service(&service(7, 81, 1024)).unwrap();
        assert_eq!(datapath.services(), [3, 4, 5, 6, 7].map(ServiceId));

        assert!(matches!(
            datapath.install(ServiceId(7), &[installed(1024, 1, &[])]),
            Err(DatapathError::NoSuchBucket { bucket: 1024, buckets: 1024, .. })
        ));
    });
}

#[test]
fn maps_are_taken_over_unless_they_do_not_fit() {
    on_new_host(|bpffs| {
        lone_interface();
        let config = config(bpffs);
        let mut first = Datapath::load(&config).unwrap();
        first.set_service(&service(1, 80, 256)).unwrap();
        first.set_service(&service(2, 81, 256)).unwrap();
        first.install(ServiceId(2), &[installed(3, 9, &[ME])]).unwrap();
        first.set_trusted(&[(A, 32), (B, 24)]).unwrap();
        drop(first);

        let mut second = Datapath::load(&config).unwrap();
        assert_eq!(second.services(), [1, 2].map(ServiceId));
        assert_eq!(second.knowledge(ServiceId(2), 3).unwrap(), Some(known(9, &[ME])));
        second.set_service(&service(3, 82, 256)).unwrap();
        assert_eq!(second.knowledge(ServiceId(2), 3).unwrap(), Some(known(9, &[ME])));
        drop(second);

        // Another capacity, another address: new maps.
        let mut wider = config.clone();
        wider.bucket_capacity *= 2;
        let mut third = Datapath::load(&wider).unwrap();
        assert_eq!(third.services(), []);
        third.set_service(&service(1, 80, 8192)).unwrap();
        drop(third);
        wider.address = A;
        assert_eq!(Datapath::load(&wider).unwrap().services(), []);

        Datapath::unload("eth0", bpffs).unwrap();
        assert!(!bpffs.join("daisy-agent").exists());
    });
}

#[test]
fn trust_is_withdrawn_at_once() {
    on_new_host(|bpffs| {
        lone_interface();
        let mut datapath = Datapath::load(&config(bpffs)).unwrap();
        let frame = encapsulated(None, &Segment::new((A, 7), SYN).to_bytes());
        let mut untrusted = 0;
        let prefixes: [(&[(Ipv4Addr, u8)], bool); 9] = [
            (&[], false),
            (&[(MUX, 32)], true),
            (&[(A, 32)], false),
            (&[(MUX, 24)], true),
            (&[(MUX, 31), (A, 32)], true),
            (&[(A, 32), (B, 32)], false),
            (&[(MUX, 0)], true),
            (&[], false),
            (&[(MUX, 1)], true),
        ];
        for (trusted, is_trusted) in prefixes {
            datapath.set_trusted(trusted).unwrap();
            // Once to be looked up, once more to be remembered.
            for _ in 0..2 {
                datapath.test_run(&frame).unwrap();
                untrusted += u64::from(!is_trusted);
                assert_eq!(
                    datapath.counters().unwrap()["dropped_untrusted_source"],
                    untrusted,
                    "{trusted:?}"
                );
            }
        }
        assert!(datapath.set_trusted(&[(MUX, 33)]).is_err());
    });
}

#[test]
fn what_is_not_a_bpf_filesystem_is_refused_with_the_remedy() {
    on_new_host(|_| {
        lone_interface();
        let folder = tempfile::tempdir().unwrap();
        let error = Datapath::load(&config(folder.path())).unwrap_err().to_string();
        assert!(error.contains("mount -t bpf bpf"), "{error}");
        let error = Datapath::unload("eth0", folder.path()).unwrap_err().to_string();
        assert!(error.contains("mount -t bpf bpf"), "{error}");
    });
}
