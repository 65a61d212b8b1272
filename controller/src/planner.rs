//! Which buckets move to reach the weighted target. Pure and deterministic.
//!
//! **Target.** A backend's exact share is `buckets · weight / Σ weight`; its target is that share rounded down or
//! up. How many are rounded up follows from the sum; *which* are is free, and chosen so that the fewest buckets
//! move: first those that already hold more than their share rounded down (each saves one move), among equals
//! the largest remainder, then the smallest number.
//!
//! **Minimality.** With these targets a plan moves `Σ max(0, held − target)` buckets plus those whose head is no
//! candidate. No plan that ends with everybody at their share rounded down or up moves fewer: a backend that holds
//! `h` must give up at least `h − ⌈share⌉`, and one more unless it is among the rounded-up, of which there is a
//! fixed number. Each move takes from one above its target and gives to one below, so none is wasted.
//!
//! **Which buckets.** Of those that a backend has to give up, first the ones that return to somebody who still
//! stands in their chain (no window opens, no chain grows), then closed windows, then the shallowest chains. A
//! bucket whose chain is full waits.

use daisy_shared::bucket::BackendId;
use daisy_shared::chain::MAX_CHAIN;

use crate::model::Bucket;

/// A backend that may be head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Who.
    pub id: BackendId,
    /// Its weight, more than 0.
    pub weight: u32,
}

/// A bucket that gets another head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// Which bucket.
    pub bucket: u32,
    /// Its new head.
    pub to: BackendId,
}

/// Buckets, some of them replaced: what a table looks like in the middle of a change.
#[derive(Clone, Copy, Debug)]
pub struct Chains<'a> {
    base: &'a [Bucket],
    replaced: &'a [(u32, Bucket)],
}

impl<'a> Chains<'a> {
    /// The buckets of `base`, but those in `replaced`, which is in ascending order.
    pub fn new(base: &'a [Bucket], replaced: &'a [(u32, Bucket)]) -> Chains<'a> {
        Chains { base, replaced }
    }

    /// How many there are.
    pub fn count(&self) -> u32 {
        self.base.len() as u32
    }

    /// One bucket.
    pub fn get(&self, number: u32) -> &'a Bucket {
        match self.replaced.binary_search_by_key(&number, |(number, _)| *number) {
            Ok(i) => &self.replaced[i].1,
            Err(_) => &self.base[number as usize],
        }
    }

    /// All, in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &'a Bucket)> + use<'a> {
        let mut replaced = self.replaced.iter().peekable();
        self.base.iter().enumerate().map(move |(number, bucket)| {
            match replaced.next_if(|(other, _)| *other as usize == number) {
                Some((_, bucket)) => (number as u32, bucket),
                None => (number as u32, bucket),
            }
        })
    }
}

/// How many buckets each candidate should be head of, in the order of `candidates`. `held` says how many each one
/// is head of now.
pub fn targets(buckets: u32, candidates: &[Candidate], held: impl Fn(BackendId) -> u32) -> Vec<u32> {
    let sum: u64 = candidates.iter().map(|candidate| u64::from(candidate.weight)).sum();
    if sum == 0 {
        return vec![0; candidates.len()];
    }
    let share = |candidate: &Candidate| {
        let product = u128::from(buckets) * u128::from(candidate.weight);
        ((product / u128::from(sum)) as u32, (product % u128::from(sum)) as u64)
    };
    let mut targets: Vec<u32> = candidates.iter().map(|candidate| share(candidate).0).collect();
    let missing = buckets - targets.iter().sum::<u32>();
    // Those with a remainder may be rounded up; there are always more of them than buckets missing.
    let mut order: Vec<usize> = (0..candidates.len()).filter(|i| share(&candidates[*i]).1 > 0).collect();
    order.sort_by_key(|&i| {
        let candidate = &candidates[i];
        let (floor, remainder) = share(candidate);
        (held(candidate.id) <= floor, std::cmp::Reverse(remainder), candidate.id)
    });
    for i in order.into_iter().take(missing as usize) {
        targets[i] += 1;
    }
    targets
}

const NO_ONE: u32 = u32::MAX;

/// The moves that reach the target, in ascending order of buckets. None if there is no candidate: heads stay.
///
/// # Panics
/// If a candidate is named twice.
pub fn plan(chains: Chains<'_>, candidates: &[Candidate]) -> Vec<Move> {
    if candidates.iter().all(|candidate| candidate.weight == 0) {
        return Vec::new();
    }
    // By backend number: its place among the candidates, and the buckets it is head of. The place after the last
    // number stands for nobody.
    let mut place = vec![NO_ONE; 1 << 16];
    for (i, candidate) in candidates.iter().enumerate() {
        assert_eq!(place[usize::from(candidate.id.0)], NO_ONE, "{candidate:?} twice");
        place[usize::from(candidate.id.0)] = i as u32;
    }
    let index = |bucket: &Bucket| usize::from(bucket.head().unwrap_or(BackendId::NONE).0);
    let mut held = vec![0u32; 1 << 16];
    for (_, bucket) in chains.iter() {
        held[index(bucket)] += 1;
    }
    let targets = targets(chains.count(), candidates, |id| held[usize::from(id.0)]);

    // What each head has to give up, and what each candidate lacks.
    let mut surplus = held;
    let mut lacks = vec![0u32; candidates.len()];
    for (i, candidate) in candidates.iter().enumerate() {
        let held = &mut surplus[usize::from(candidate.id.0)];
        lacks[i] = targets[i].saturating_sub(*held);
        *held = held.saturating_sub(targets[i]);
    }

    // Buckets that may go, by the length of their chain. Of closed windows no more than their head has to give up;
    // of open ones all, because each may have its own reason to go.
    let mut by_depth: [Vec<Due>; MAX_CHAIN] = Default::default();
    let mut closed = surplus.clone();
    for (number, bucket) in chains.iter() {
        let (depth, head) = (bucket.links.len(), index(bucket));
        if surplus[head] == 0 || depth == MAX_CHAIN {
            continue;
        }
        if depth <= 1 {
            if closed[head] == 0 {
                continue;
            }
            closed[head] -= 1;
        }
        by_depth[depth].push(Due { number, head: head as u16 });
    }
    let mut chosen = vec![NO_ONE; chains.count() as usize];
    return_to_chain(chains, &by_depth, &place, &mut surplus, &mut lacks, &mut chosen);
    spread(&by_depth, &mut surplus, &mut lacks, &mut chosen);

    let count = chosen.iter().filter(|to| **to != NO_ONE).count();
    let mut moves = Vec::with_capacity(count);
    for (bucket, to) in chosen.into_iter().enumerate().filter(|(_, to)| *to != NO_ONE) {
        moves.push(Move { bucket: bucket as u32, to: candidates[to as usize].id });
    }
    moves
}

/// A bucket that may go, and the number of its head, so that nobody has to look it up again.
#[derive(Clone, Copy)]
struct Due {
    number: u32,
    head: u16,
}

/// Buckets that go back to somebody in their chain, shallow ones first.
fn return_to_chain(
    chains: Chains<'_>,
    by_depth: &[Vec<Due>],
    place: &[u32],
    surplus: &mut [u32],
    lacks: &mut [u32],
    chosen: &mut [u32],
) {
    for &Due { number, head } in by_depth[2..].iter().flatten() {
        let head = usize::from(head);
        if surplus[head] == 0 {
            continue;
        }
        let links = &chains.get(number).links;
        let to = links[1..].iter().map(|link| place[usize::from(link.owner.0)]);
        if let Some(to) = to.into_iter().find(|to| *to != NO_ONE && lacks[*to as usize] > 0) {
            surplus[head] -= 1;
            lacks[to as usize] -= 1;
            chosen[number as usize] = to;
        }
    }
}

/// The other buckets that must go, shallow ones first, in turn to everybody who lacks some.
fn spread(by_depth: &[Vec<Due>], surplus: &mut [u32], lacks: &mut [u32], chosen: &mut [u32]) {
    let mut takers: Vec<usize> = (0..lacks.len()).filter(|i| lacks[*i] > 0).collect();
    let mut turn = 0;
    for &Due { number, head } in by_depth.iter().flatten() {
        if takers.is_empty() {
            return;
        }
        let head = usize::from(head);
        if surplus[head] == 0 || chosen[number as usize] != NO_ONE {
            continue;
        }
        if turn == takers.len() {
            turn = 0;
        }
        let to = takers[turn];
        surplus[head] -= 1;
        lacks[to] -= 1;
        chosen[number as usize] = to as u32;
        if lacks[to] == 0 {
            takers.remove(turn);
        } else {
            turn += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chains;
    use crate::model::Link;
    use daisy_shared::chain::Generation;
    use proptest::prelude::*;

    fn bucket(owners: &[u16]) -> Bucket {
        let link = |owner: &u16| Link { owner: BackendId(*owner), since: Generation(0) };
        Bucket { generation: Generation(0), links: owners.iter().map(link).collect() }
    }

    fn candidates(weights: &[(u16, u32)]) -> Vec<Candidate> {
        weights.iter().map(|(id, weight)| Candidate { id: BackendId(*id), weight: *weight }).collect()
    }

    fn carry_out(buckets: &[Bucket], moves: &[Move]) -> Vec<Bucket> {
        let mut after = buckets.to_vec();
        for Move { bucket, to } in moves {
            let place = &mut after[*bucket as usize];
            *place = chains::moved(place, *to, Generation(1)).expect("a bucket that can move");
        }
        after
    }

    fn heads(buckets: &[Bucket], id: BackendId) -> u32 {
        buckets.iter().filter(|bucket| bucket.head() == Some(id)).count() as u32
    }

    /// The fewest moves to any split in which everybody has their exact share rounded down or up, by trying all.
    fn fewest_moves(buckets: &[Bucket], candidates: &[Candidate]) -> u32 {
        let (count, sum) =
            (buckets.len() as u64, candidates.iter().map(|c| u64::from(c.weight)).sum::<u64>());
        let held: Vec<u64> = candidates.iter().map(|c| u64::from(heads(buckets, c.id))).collect();
        let strays = count - held.iter().sum::<u64>();
        let mut best = u64::MAX;
        for rounding in 0..1u32 << candidates.len() {
            let split: Vec<u64> = candidates
                .iter()
                .enumerate()
                .map(|(i, c)| {
                    let product = count * u64::from(c.weight);
                    if rounding >> i & 1 == 1 { product.div_ceil(sum) } else { product / sum }
                })
                .collect();
            if split.iter().sum::<u64>() == count {
                let given: u64 = held.iter().zip(&split).map(|(held, want)| held.saturating_sub(*want)).sum();
                best = best.min(given + strays);
            }
        }
        best as u32
    }

    /// Tables of 16 or 64 buckets in which numbers 0 to 5 own something, and candidates among them and others.
    fn situations(longest: usize) -> impl Strategy<Value = (Vec<Bucket>, Vec<Candidate>)> {
        let chain = proptest::sample::subsequence(vec![0u16, 1, 2, 3, 4, 5], 0..=longest).prop_shuffle();
        let table = prop_oneof![Just(16usize), Just(64)]
            .prop_flat_map(move |count| proptest::collection::vec(chain.clone(), count));
        let able = proptest::collection::btree_map(0u16..8, prop_oneof![1u32..5, Just(100), 0u32..2], 1..7);
        (table, able).prop_map(|(table, able)| {
            let weights: Vec<(u16, u32)> = able.into_iter().collect();
            (table.iter().map(|chain| bucket(chain)).collect(), candidates(&weights))
        })
    }

    proptest! {
        #[test]
        fn the_fewest_moves_reach_the_target((buckets, candidates) in situations(MAX_CHAIN - 1)) {
            let moves = plan(Chains::new(&buckets, &[]), &candidates);
            if candidates.iter().all(|candidate| candidate.weight == 0) {
                prop_assert_eq!(moves, []);
                return Ok(());
            }
            prop_assert_eq!(moves.len() as u32, fewest_moves(&buckets, &candidates));
            let after = carry_out(&buckets, &moves);
            let sum: u64 = candidates.iter().map(|c| u64::from(c.weight)).sum();
            for c in &candidates {
                let exact = buckets.len() as u64 * u64::from(c.weight);
                let held = u64::from(heads(&after, c.id));
                prop_assert!(held == exact / sum || held == exact.div_ceil(sum), "{c:?} holds {held}");
            }
            // Whoever plans again has nothing to do, and whoever plans the same plans the same.
            prop_assert_eq!(plan(Chains::new(&after, &[]), &candidates), []);
            prop_assert_eq!(plan(Chains::new(&buckets, &[]), &candidates), moves);
        }

        #[test]
        fn full_chains_wait_and_all_else_that_can_move_does((buckets, candidates) in situations(MAX_CHAIN)) {
            let moves = plan(Chains::new(&buckets, &[]), &candidates);
            prop_assert!(moves.iter().all(|m| buckets[m.bucket as usize].links.len() < MAX_CHAIN));
            if candidates.iter().all(|candidate| candidate.weight == 0) {
                return Ok(());
            }
            let targets = targets(buckets.len() as u32, &candidates, |id| heads(&buckets, id));
            let target = |id| candidates.iter().position(|c| c.id == id).map_or(0, |i| targets[i]);
            let mut due = buckets.iter().filter(|b| b.links.is_empty()).count() as u32;
            for id in (0..6).map(BackendId) {
                let movable = buckets.iter().filter(|b| b.head() == Some(id) && b.links.len() < MAX_CHAIN);
                due += heads(&buckets, id).saturating_sub(target(id)).min(movable.count() as u32);
            }
            prop_assert_eq!(moves.len() as u32, due);
        }

        #[test]
        fn replaced_buckets_count(
            (base, candidates) in situations(4),
            replaced in proptest::collection::btree_map(0u32..16, 0u16..6, 0..16),
        ) {
            let replaced: Vec<(u32, Bucket)> =
                replaced.into_iter().map(|(number, owner)| (number, bucket(&[owner]))).collect();
            let mut whole = base.clone();
            for (number, bucket) in &replaced {
                whole[*number as usize] = bucket.clone();
            }
            let moves = plan(Chains::new(&base, &replaced), &candidates);
            prop_assert_eq!(moves, plan(Chains::new(&whole, &[]), &candidates));
        }
    }

    #[test]
    fn closed_windows_go_first_and_then_the_shallowest() {
        let mut buckets = vec![bucket(&[1, 3, 4, 5]), bucket(&[1, 3, 4]), bucket(&[1, 3])];
        buckets.resize(16, bucket(&[1]));
        let moves = plan(Chains::new(&buckets, &[]), &candidates(&[(1, 3), (2, 13)]));
        assert_eq!(moves.iter().map(|m| m.bucket).collect::<Vec<_>>(), (3..16).collect::<Vec<_>>());
        let moves = plan(Chains::new(&buckets, &[]), &candidates(&[(1, 1), (2, 15)]));
        assert_eq!(moves.iter().map(|m| m.bucket).collect::<Vec<_>>(), (1..16).collect::<Vec<_>>());
    }

    #[test]
    fn buckets_return_to_where_their_connections_are() {
        let mut buckets = vec![bucket(&[1]); 8];
        buckets.resize(16, bucket(&[1, 2]));
        let moves = plan(Chains::new(&buckets, &[]), &candidates(&[(1, 1), (2, 1)]));
        assert_eq!(moves, (8..16).map(|bucket| Move { bucket, to: BackendId(2) }).collect::<Vec<_>>());
    }

    #[test]
    fn who_holds_more_than_its_floor_keeps_it() {
        // Shares of 16/3 each: one of the three is rounded up, and it is the one that holds 6 already.
        let held = |id: BackendId| if id.0 == 2 { 6 } else { 5 };
        assert_eq!(targets(16, &candidates(&[(0, 1), (1, 1), (2, 1)]), held), [5, 5, 6]);
        assert_eq!(targets(16, &candidates(&[(0, 1), (1, 1), (2, 1)]), |_| 0), [6, 5, 5]);
        assert_eq!(targets(16, &candidates(&[(0, 5), (1, 7), (2, 0)]), |_| 0), [7, 9, 0]);
        assert_eq!(targets(1 << 20, &candidates(&[(0, 1_000_000), (1, 1)]), |_| 0), [(1 << 20) - 1, 1]);
    }
}
