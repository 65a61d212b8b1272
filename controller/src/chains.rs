//! What moves, drain reports, deaths and re-basing do to a bucket's chain. Pure.

use daisy_shared::bucket::BackendId;
use daisy_shared::chain::{Generation, MAX_CHAIN};

use crate::model::{Bucket, Link};

/// Makes `target` the head: it leaves its later place if it had one, and the old head becomes the newest previous
/// owner. `None` if nothing changes, or if the chain is full and has to wait.
pub fn moved(bucket: &Bucket, target: BackendId, generation: Generation) -> Option<Bucket> {
    if bucket.head() == Some(target) {
        return None;
    }
    let stays = bucket.links.iter().filter(|link| link.owner != target);
    if stays.clone().count() >= MAX_CHAIN {
        return None;
    }
    let mut links = arrayvec::ArrayVec::new();
    links.push(Link { owner: target, since: generation });
    links.extend(stays.copied());
    if let Some(old_head) = links.get_mut(1)
        && bucket.head() == Some(old_head.owner)
    {
        old_head.since = generation;
    }
    Some(Bucket { generation, links })
}

/// Takes owners out of the chain. The next in the chain becomes head where a head goes. `None` if none of them is
/// in it.
pub fn spliced(bucket: &Bucket, goes: impl Fn(BackendId) -> bool, generation: Generation) -> Option<Bucket> {
    if !bucket.links.iter().any(|link| goes(link.owner)) {
        return None;
    }
    let mut links: arrayvec::ArrayVec<Link, MAX_CHAIN> =
        bucket.links.iter().filter(|link| !goes(link.owner)).copied().collect();
    if let Some(head) = links.first_mut()
        && bucket.head() != Some(head.owner)
    {
        head.since = generation;
    }
    Some(Bucket { generation, links })
}

/// Whether the word of `owner`, given with knowledge of generation `known`, lets it leave the chain (rule 8): it
/// is a previous owner, and knew of the change in which it lost headship, or of a later one.
pub fn accepts_report(bucket: &Bucket, owner: BackendId, known: Generation) -> bool {
    match bucket.position(owner) {
        None | Some(0) => false,
        Some(place) => !bucket.links[place].since.is_newer_than(known),
    }
}

/// Stamps the bucket with a generation, as if everything in it had happened then: no report given with older
/// knowledge counts any more.
pub fn rebased(bucket: &Bucket, generation: Generation) -> Bucket {
    let links = bucket.links.iter().map(|link| Link { since: generation, ..*link }).collect();
    Bucket { generation, links }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bucket(generation: u32, links: &[(u16, u32)]) -> Bucket {
        let link = |(owner, since): &(u16, u32)| Link { owner: BackendId(*owner), since: Generation(*since) };
        Bucket { generation: Generation(generation), links: links.iter().map(link).collect() }
    }

    #[test]
    fn a_move_puts_the_old_head_behind_the_new_one() {
        let b = bucket(4, &[(1, 4), (2, 4)]);
        assert_eq!(moved(&b, BackendId(3), Generation(5)), Some(bucket(5, &[(3, 5), (1, 5), (2, 4)])));
        assert_eq!(moved(&b, BackendId(2), Generation(5)), Some(bucket(5, &[(2, 5), (1, 5)])));
        assert_eq!(moved(&b, BackendId(1), Generation(5)), None);
        assert_eq!(moved(&bucket(0, &[]), BackendId(1), Generation(1)), Some(bucket(1, &[(1, 1)])));
    }

    #[test]
    fn a_full_chain_waits_unless_the_target_is_in_it() {
        let full = bucket(9, &[(1, 9), (2, 9), (3, 8), (4, 7), (5, 6), (6, 5)]);
        assert_eq!(moved(&full, BackendId(7), Generation(10)), None);
        let back = moved(&full, BackendId(6), Generation(10));
        assert_eq!(back, Some(bucket(10, &[(6, 10), (1, 10), (2, 9), (3, 8), (4, 7), (5, 6)])));
    }

    #[test]
    fn the_next_owner_follows_a_head_that_goes() {
        let b = bucket(4, &[(1, 4), (2, 4), (3, 2)]);
        assert_eq!(spliced(&b, |o| o.0 == 1, Generation(5)), Some(bucket(5, &[(2, 5), (3, 2)])));
        assert_eq!(spliced(&b, |o| o.0 == 3, Generation(5)), Some(bucket(5, &[(1, 4), (2, 4)])));
        assert_eq!(spliced(&b, |o| o.0 == 9, Generation(5)), None);
    }

    #[test]
    fn a_report_counts_from_the_generation_in_which_headship_was_lost() {
        let b = bucket(7, &[(1, 7), (2, 7), (3, 5)]);
        let accepts = |owner, known| accepts_report(&b, BackendId(owner), Generation(known));
        assert!(!accepts(1, 9) && !accepts(4, 9));
        assert!(!accepts(2, 6) && accepts(2, 7) && accepts(2, 8));
        assert!(!accepts(3, 4) && accepts(3, 5));
        let b = rebased(&b, Generation(20));
        assert!(!accepts_report(&b, BackendId(3), Generation(19)));
        assert!(accepts_report(&b, BackendId(3), Generation(20)));
    }

    proptest! {
        #[test]
        fn chains_stay_well_formed(steps in proptest::collection::vec((0u16..9, any::<bool>()), 0..60)) {
            let mut b = Bucket::default();
            for (i, (owner, moves)) in steps.into_iter().enumerate() {
                let (owner, now) = (BackendId(owner), Generation(u32::MAX - 20).0.wrapping_add(i as u32));
                let next = if moves { moved(&b, owner, Generation(now)) } else { spliced(&b, |o| o == owner, Generation(now)) };
                if let Some(next) = next {
                    prop_assert_eq!(next.generation, Generation(now));
                    prop_assert!(b.links.iter().all(|l| next.position(l.owner).is_some() || (!moves && l.owner == owner)));
                    b = next;
                }
                let mut owners: Vec<u16> = b.links.iter().map(|l| l.owner.0).collect();
                owners.sort();
                owners.dedup();
                prop_assert_eq!(owners.len(), b.links.len());
                // Newest first: nobody behind lost headship later than somebody before.
                prop_assert!(b.links.windows(2).skip(1).all(|w| !w[1].since.is_newer_than(w[0].since)));
            }
        }
    }
}
