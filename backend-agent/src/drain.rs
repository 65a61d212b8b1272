//! Rule 8: an owner leaves a chain only on its own word.
//!
//! A bucket in which this backend is a previous owner is *watched*. It is reported as drained when
//!
//! 1. the data path knows a generation at least as new as the table's, and in it somebody else is head: from then
//!    on it accepts nothing new in the bucket (rule 6), so that zero connections stay zero;
//! 2. after that, two dumps of the kernel's sockets in a row, at least [`DUMPS_APART`] apart, show nothing in the
//!    bucket. One is not enough: a SYN that the data path has let through just before it learned needs a moment
//!    to become a request socket, and a dump in several parts may skip a socket while others vanish beside it;
//! 3. no SYN cookie that was issued while this backend was head can still come back: a cookie leaves no trace in
//!    the kernel but the counter `SyncookiesSent`, and is valid for two minutes.
//!
//! Nothing here does I/O or reads a clock.

use std::collections::{BTreeMap, HashMap};
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use bitvec::prelude::{BitSlice, BitVec};
use daisy_shared::chain::{Generation, Knowledge};
use daisy_shared::service::{Service, ServiceId};

/// The least time between two dumps that prove a bucket empty.
pub const DUMPS_APART: Duration = Duration::from_secs(1);
/// How long after it was issued a SYN cookie may come back: two periods of a minute (`MAX_SYNCOOKIE_AGE`), and
/// what the clock of those periods and the network add.
pub const COOKIE_LIFE: Duration = Duration::from_secs(130);
/// A bucket that was reported and is watched still is reported again after this long.
pub const REPORT_AGAIN: Duration = Duration::from_secs(30);

/// The buckets in which this backend is a previous owner, and what is known of each.
#[derive(Debug, Default)]
pub struct Drain {
    services: BTreeMap<ServiceId, Watched>,
    cookies: Cookies,
}

/// The watched buckets of a service.
#[derive(Debug)]
struct Watched {
    service: Service,
    /// The watched buckets.
    buckets: BitVec,
    watches: HashMap<u32, Watch>,
}

/// A watched bucket.
#[derive(Debug)]
struct Watch {
    /// The bucket's generation in the table.
    table: Generation,
    /// What the data path knew when it was first seen to know that somebody else is head, and when that was.
    known: Option<(Generation, Instant)>,
    /// The end of the first of the latest dumps that have all shown nothing.
    empty_since: Option<Instant>,
    reported: Option<Instant>,
}

impl Drain {
    /// Takes over a table. For each bucket, `watch` says the generation in which this backend is a previous
    /// owner; `None` that it is not. Buckets that are not named stay as they are, or, if the table is a
    /// `snapshot`, are no longer watched.
    pub fn set_table(
        &mut self,
        service: &Service,
        snapshot: bool,
        watch: impl IntoIterator<Item = (u32, Option<Generation>)>,
    ) {
        let watched = self.services.entry(service.id).or_insert_with(|| Watched {
            service: service.clone(),
            buckets: BitVec::repeat(false, service.buckets as usize),
            watches: HashMap::new(),
        });
        if snapshot {
            watched.buckets.fill(false);
        }
        for (bucket, generation) in watch {
            watched.buckets.set(bucket as usize, generation.is_some());
            let Some(table) = generation else { continue };
            // What was seen under another generation says nothing: this backend may have been head in between.
            let fresh = Watch { table, known: None, empty_since: None, reported: None };
            let watch = watched.watches.entry(bucket).or_insert_with(|| Watch { ..fresh });
            if watch.table != table {
                *watch = fresh;
            }
        }
        watched.watches.retain(|bucket, _| watched.buckets[*bucket as usize]);
    }

    /// Forgets a service.
    pub fn remove_service(&mut self, service: ServiceId) {
        self.services.remove(&service);
    }

    /// The services in which buckets are watched.
    pub fn services(&self) -> Vec<Service> {
        let busy = self.services.values().filter(|watched| !watched.watches.is_empty());
        busy.map(|watched| watched.service.clone()).collect()
    }

    /// How many buckets are watched.
    pub fn watched(&self) -> u64 {
        self.services.values().map(|watched| watched.watches.len() as u64).sum()
    }

    /// The watched buckets of which it is not known yet that the data path knows a new head, with their
    /// generations in the table.
    pub fn unverified(&self, service: ServiceId) -> Vec<(u32, Generation)> {
        let watches = self.services.get(&service).map(|watched| &watched.watches).into_iter().flatten();
        let unverified = watches.filter(|(_, watch)| watch.known.is_none());
        unverified.map(|(&bucket, watch)| (bucket, watch.table)).collect()
    }

    /// Takes over what the data path knows of a bucket whose generation in the table is `table`.
    pub fn verify(
        &mut self,
        service: ServiceId,
        (bucket, table): (u32, Generation),
        knowledge: &Knowledge<Ipv4Addr>,
        me: Ipv4Addr,
        now: Instant,
    ) {
        let newer_or_same = !table.is_newer_than(knowledge.generation);
        let head_elsewhere = knowledge.chain.first().is_some_and(|head| *head != me);
        if !(newer_or_same && head_elsewhere) {
            return;
        }
        let watches = self.services.get_mut(&service).map(|watched| &mut watched.watches);
        if let Some(watch) = watches.and_then(|watches| watches.get_mut(&bucket))
            && watch.table == table
        {
            watch.known.get_or_insert((knowledge.generation, now));
        }
    }

    /// Takes over the kernel's count of SYN cookies sent, since its network namespace began.
    pub fn cookies_sent(&mut self, count: u64, now: Instant) {
        self.cookies.count(count, now);
    }

    /// Takes over a dump of a service's sockets: the buckets that hold any. Returns what is to be reported: empty
    /// buckets with the generation that the data path knew before the dumps.
    pub fn dumped(
        &mut self,
        service: ServiceId,
        held: &BitSlice,
        begun: Instant,
        ended: Instant,
    ) -> Vec<(u32, Generation)> {
        let Some(watched) = self.services.get_mut(&service) else { return Vec::new() };
        let mut report = Vec::new();
        for (&bucket, watch) in &mut watched.watches {
            let Some((generation, since)) = watch.known.filter(|(_, since)| *since <= begun) else {
                continue;
            };
            if held[bucket as usize] {
                watch.empty_since = None;
                continue;
            }
            let first = *watch.empty_since.get_or_insert(ended);
            let apart = begun.saturating_duration_since(first) >= DUMPS_APART;
            let again = watch.reported.is_none_or(|at| ended.duration_since(at) >= REPORT_AGAIN);
            if apart && again && self.cookies.are_gone(since, ended) {
                watch.reported = Some(ended);
                report.push((bucket, generation));
            }
        }
        report.sort_by_key(|(bucket, _)| *bucket);
        report
    }
}

/// When SYN cookies were issued.
#[derive(Debug, Default)]
struct Cookies {
    count: Option<u64>,
    /// The last time that the count was seen to have grown. One that is not zero at first may just have.
    grown: Option<Instant>,
}

impl Cookies {
    fn count(&mut self, count: u64, now: Instant) {
        if count != self.count.unwrap_or(0) {
            self.grown = Some(now);
        }
        self.count = Some(count);
    }

    /// Whether no cookie that was issued before `lost`, when headship was lost, can come back any more.
    fn are_gone(&self, lost: Instant, now: Instant) -> bool {
        // Nothing was counted: nothing is known.
        self.count.is_some() && self.grown.is_none_or(|grown| now >= grown.min(lost) + COOKIE_LIFE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bitvec::prelude::bitvec;
    use daisy_shared::flow::HashKey;
    use daisy_shared::service::{Encapsulation, Protocol};

    const ME: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
    const OTHER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
    const ID: ServiceId = ServiceId(3);

    fn service() -> Service {
        Service {
            id: ID,
            name: "web".into(),
            vip: "203.0.113.1".parse().unwrap(),
            protocol: Protocol::Tcp,
            port: 80,
            buckets: 16,
            hash_key: HashKey([0; 16]),
            encapsulation: Encapsulation::Gue,
        }
    }

    fn known(generation: u32, head: Ipv4Addr) -> Knowledge<Ipv4Addr> {
        Knowledge {
            generation: Generation(generation),
            chain: [head].into_iter().collect(),
            from_table: true,
        }
    }

    /// A drain that watches buckets 1 and 2 of generation 10, with a clock in milliseconds.
    struct Bench {
        drain: Drain,
        start: Instant,
    }

    impl Bench {
        fn new() -> Bench {
            let mut bench = Bench { drain: Drain::default(), start: Instant::now() };
            bench.cookies(0, 0);
            bench.table(true, &[(1, Some(10)), (2, Some(10)), (3, None)]);
            bench
        }

        fn at(&self, ms: u64) -> Instant {
            self.start + Duration::from_millis(ms)
        }

        fn table(&mut self, snapshot: bool, watch: &[(u32, Option<u32>)]) {
            let watch = watch.iter().map(|(bucket, generation)| (*bucket, generation.map(Generation)));
            self.drain.set_table(&service(), snapshot, watch);
        }

        fn cookies(&mut self, ms: u64, count: u64) {
            let now = self.at(ms);
            self.drain.cookies_sent(count, now);
        }

        fn verify(&mut self, ms: u64, bucket: u32, knowledge: &Knowledge<Ipv4Addr>) {
            let now = self.at(ms);
            let unverified = self.drain.unverified(ID);
            if let Some(of) = unverified.iter().find(|of| of.0 == bucket) {
                self.drain.verify(ID, *of, knowledge, ME, now);
            }
        }

        /// A dump that takes 100 ms.
        fn dump(&mut self, ms: u64, held: &[usize]) -> Vec<(u32, u32)> {
            let (begun, ended) = (self.at(ms), self.at(ms + 100));
            let mut bits = bitvec![0; 16];
            held.iter().for_each(|bucket| bits.set(*bucket, true));
            let report = self.drain.dumped(ID, &bits, begun, ended);
            report.into_iter().map(|(bucket, generation)| (bucket, generation.0)).collect()
        }
    }

    #[test]
    fn two_empty_dumps_after_the_knowledge_are_reported() {
        let mut bench = Bench::new();
        assert_eq!(bench.dump(0, &[]), []);
        bench.verify(500, 1, &known(12, OTHER));
        assert_eq!(bench.dump(1000, &[]), []);
        // Less than a second after the end of the one before.
        assert_eq!(bench.dump(2000, &[]), []);
        // With the generation that the data path knew. Bucket 2 was never verified.
        assert_eq!(bench.dump(2100, &[]), [(1, 12)]);
        // Once; and again if nothing comes of it.
        assert_eq!(bench.dump(3100, &[]), []);
        assert_eq!(bench.dump(40_000, &[]), [(1, 12)]);
    }

    #[test]
    fn a_head_or_one_that_does_not_know_reports_nothing() {
        for knowledge in [known(9, OTHER), known(10, ME), known(11, ME)] {
            let mut bench = Bench::new();
            bench.verify(0, 1, &knowledge);
            assert!((1..9).all(|second| bench.dump(second * 2000, &[]).is_empty()), "{knowledge:?}");
        }
    }

    #[test]
    fn a_connection_between_dumps_starts_the_count_anew() {
        let mut bench = Bench::new();
        bench.verify(0, 1, &known(10, OTHER));
        bench.verify(0, 2, &known(10, OTHER));
        assert_eq!(bench.dump(1000, &[1]), []);
        assert_eq!(bench.dump(3000, &[2]), []);
        assert_eq!(bench.dump(5000, &[]), [(1, 10)]);
        assert_eq!(bench.dump(7000, &[]), [(2, 10)]);
    }

    #[test]
    fn a_dump_that_began_before_the_knowledge_does_not_count() {
        let mut bench = Bench::new();
        bench.verify(1050, 1, &known(10, OTHER));
        assert_eq!(bench.dump(1000, &[]), []);
        assert_eq!(bench.dump(3000, &[]), []);
        assert_eq!(bench.dump(5000, &[]), [(1, 10)]);
    }

    #[test]
    fn a_new_generation_of_the_bucket_starts_anew() {
        let mut bench = Bench::new();
        bench.verify(0, 1, &known(10, OTHER));
        bench.verify(0, 2, &known(10, OTHER));
        assert_eq!(bench.dump(1000, &[]), []);
        bench.table(false, &[(1, Some(11))]);
        assert_eq!(bench.dump(3000, &[]), [(2, 10)]);
        assert_eq!(bench.drain.unverified(ID), [(1, Generation(11))]);
        // Knowledge that was asked for under the old generation comes too late.
        let now = bench.at(3000);
        bench.drain.verify(ID, (1, Generation(10)), &known(10, OTHER), ME, now);
        assert_eq!(bench.drain.unverified(ID), [(1, Generation(11))]);
        // A snapshot that repeats what is known changes nothing; what it does not name is gone.
        bench.verify(4000, 1, &known(11, OTHER));
        assert_eq!(bench.dump(5000, &[]), []);
        bench.table(true, &[(1, Some(11))]);
        assert_eq!((bench.dump(7000, &[]), bench.drain.watched()), (vec![(1, 11)], 1));
        // Head again.
        bench.table(false, &[(1, None)]);
        assert_eq!((bench.drain.watched(), bench.drain.services().len()), (0, 0));
        assert_eq!(bench.dump(50_000, &[]), []);
    }

    #[test]
    fn cookies_of_the_time_as_head_are_waited_for() {
        // Issued before headship was lost: their age counts from when they were counted.
        let mut bench = Bench::new();
        bench.cookies(5_000, 7);
        bench.verify(60_000, 1, &known(10, OTHER));
        bench.cookies(60_000, 7);
        assert_eq!(bench.dump(61_000, &[]), []);
        assert_eq!(bench.dump(134_000, &[]), []);
        assert_eq!(bench.dump(135_000, &[]), [(1, 10)]);

        // Issued later still, for other buckets: only those of the time as head matter.
        let mut bench = Bench::new();
        bench.verify(1_000, 1, &known(10, OTHER));
        for second in 2..131 {
            bench.cookies(second * 1000, second);
            assert_eq!(bench.dump(second * 1000 - 200, &[]), []);
        }
        assert_eq!(bench.dump(131_000, &[]), [(1, 10)]);

        // Issued before this program started, nobody knows when.
        let mut bench = Bench { drain: Drain::default(), start: Instant::now() };
        bench.cookies(0, 99);
        bench.table(true, &[(1, Some(10))]);
        bench.verify(0, 1, &known(10, OTHER));
        assert_eq!(bench.dump(1_000, &[]), []);
        assert_eq!(bench.dump(129_000, &[]), []);
        assert_eq!(bench.dump(130_000, &[]), [(1, 10)]);

        // Not counted at all.
        let mut bench = Bench { drain: Drain::default(), start: Instant::now() };
        bench.table(true, &[(1, Some(10))]);
        bench.verify(0, 1, &known(10, OTHER));
        assert_eq!(bench.dump(1_000, &[]), []);
        assert_eq!(bench.dump(300_000, &[]), []);
    }

    #[test]
    fn a_removed_service_is_forgotten() {
        let mut bench = Bench::new();
        bench.drain.remove_service(ID);
        assert_eq!((bench.drain.watched(), bench.dump(0, &[])), (0, vec![]));
    }
}
