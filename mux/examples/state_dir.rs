//! Writes a state directory from which a mux starts and forwards though no controller answers: one service, and
//! backends 10.2.0.1, 10.2.0.2, … in its buckets by turns. For measurements where there is no controller.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use clap::Parser;
use daisy_node::store::Store;
use daisy_shared::bucket::{BackendId, Entry, Piece};
use daisy_shared::chain::Generation;
use daisy_shared::control::{Directory, DirectoryEntry, TableUpdate};
use daisy_shared::flow::HashKey;
use daisy_shared::service::{Encapsulation, Protocol, Service, ServiceId};

/// Writes a mux's state directory with one service.
#[derive(Debug, Parser)]
struct Args {
    /// The directory.
    dir: PathBuf,
    /// The service's address.
    #[arg(long, default_value = "203.0.113.1")]
    vip: Ipv4Addr,
    /// The service's port.
    #[arg(long, default_value_t = 80)]
    port: u16,
    /// How many buckets it has, a power of two.
    #[arg(long, default_value_t = 65_536)]
    buckets: u32,
    /// How many backends it has.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(2..=250))]
    backends: u16,
    /// The address of the first backend, where 10.2.0.1 will not do. The others follow.
    #[arg(long, default_value = "10.2.0.1")]
    first_backend: Ipv4Addr,
    /// Every so many buckets have an open window; 0: none.
    #[arg(long, default_value_t = 0)]
    open_every: u32,
}

fn main() -> std::io::Result<()> {
    let args = Args::parse();
    let generation = Generation(1);
    let backend = |number: u16| DirectoryEntry {
        id: BackendId(number),
        name: format!("b{number}"),
        address: Ipv4Addr::from_bits(args.first_backend.to_bits() + u32::from(number) - 1).into(),
        dead: false,
    };
    let directory =
        Directory { version: 1, backends: (1..=args.backends).map(backend).collect(), muxes: Vec::new() };
    let service = Service {
        id: ServiceId(1),
        name: "measured".to_owned(),
        vip: args.vip.into(),
        protocol: Protocol::Tcp,
        port: args.port,
        buckets: args.buckets,
        hash_key: HashKey([7; 16]),
        encapsulation: Encapsulation::Gue,
    };
    let entry = |bucket: u32| {
        let owner = |step: u32| BackendId((bucket.wrapping_add(step) % u32::from(args.backends)) as u16 + 1);
        let is_open = args.open_every > 0 && bucket.is_multiple_of(args.open_every);
        let chain = std::iter::once(owner(0)).chain(is_open.then(|| owner(1))).collect();
        Entry { bucket, generation, chain }
    };
    let piece = Piece {
        service: service.id,
        from: None,
        generation,
        buckets: args.buckets,
        entries: (0..args.buckets).map(entry).collect(),
    };
    let store = Store::open(&args.dir)?;
    store.save_directory(directory);
    store.save_table(TableUpdate { service, piece });
    // Written when the store is dropped.
    Ok(())
}
