//! The store in one file beside the controller, by `redb`.
//!
//! | table | key | value |
//! |---|---|---|
//! | `meta` | `schema` or `state` | the schema version; versions and counters as JSON |
//! | `services` | number | the service without its buckets, as JSON |
//! | `backends` | number | the backend, as JSON |
//! | `muxes` | name | the mux, as JSON |
//! | `blocks` | service number, block number | [`BLOCK`] buckets |
//!
//! Buckets lie in blocks, because a row for each would cost more than what it holds, and a page is written whole
//! anyway. Only blocks with changed buckets are written. A bucket is `generation:32 | owners:8` and for each owner
//! `owner:16 | since:32`, in network byte order. A block that was never written holds buckets that never changed.

use std::path::{Path, PathBuf};

use arrayvec::ArrayVec;
use daisy_shared::bucket::BackendId;
use daisy_shared::chain::Generation;
use daisy_shared::service::{ServiceId, is_bucket_count};
use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{StoreError, block_key, place};
use crate::model::{Bucket, Change, Link, ServiceRecord, ServiceState, State};

/// The version of what lies in the tables.
pub const SCHEMA: u64 = 1;
/// Buckets in a block.
pub const BLOCK: usize = 64;

const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
const SERVICES: TableDefinition<'_, u32, &[u8]> = TableDefinition::new("services");
const BACKENDS: TableDefinition<'_, u16, &[u8]> = TableDefinition::new("backends");
const MUXES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("muxes");
const BLOCKS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("blocks");

/// The store in one file.
#[derive(Debug)]
pub struct Embedded {
    path: PathBuf,
    database: Database,
}

impl Embedded {
    /// Opens the store, or makes an empty one, and reads the state. The file is locked for this process.
    ///
    /// # Errors
    /// [`StoreError`]; then nothing was changed.
    pub fn open(path: &Path) -> Result<(Embedded, State), StoreError> {
        let database = Database::create(path).map_err(|error| match error {
            DatabaseError::DatabaseAlreadyOpen => StoreError::InUse(path.to_owned()),
            other => StoreError::Disk { path: path.to_owned(), error: other.into() },
        })?;
        let store = Embedded { path: path.to_owned(), database };
        store.prepare()?;
        let state = store.read()?;
        Ok((store, state))
    }

    fn disk(&self, error: impl Into<redb::Error>) -> StoreError {
        StoreError::Disk { path: self.path.clone(), error: error.into() }
    }

    fn damaged(&self, place: impl Into<String>, why: impl ToString) -> StoreError {
        StoreError::Damaged { path: self.path.clone(), place: place.into(), why: why.to_string() }
    }

    /// Makes sure that all tables are there, and that this program understands them.
    fn prepare(&self) -> Result<(), StoreError> {
        let write = self.database.begin_write().map_err(|e| self.disk(e))?;
        {
            let mut meta = write.open_table(META).map_err(|e| self.disk(e))?;
            let found = match meta.get("schema").map_err(|e| self.disk(e))? {
                None => None,
                Some(bytes) => Some(self.parse::<u64>(bytes.value(), || "meta schema".into())?),
            };
            match found {
                Some(SCHEMA) => {}
                Some(found) if found > SCHEMA => {
                    return Err(StoreError::Newer { path: self.path.clone(), found, known: SCHEMA });
                }
                Some(found) => return Err(self.damaged("meta schema", format!("version {found} never was"))),
                None => {
                    let version = self.json(&SCHEMA)?;
                    meta.insert("schema", &version[..]).map_err(|e| self.disk(e))?;
                }
            }
            write.open_table(SERVICES).map_err(|e| self.disk(e))?;
            write.open_table(BACKENDS).map_err(|e| self.disk(e))?;
            write.open_table(MUXES).map_err(|e| self.disk(e))?;
            write.open_table(BLOCKS).map_err(|e| self.disk(e))?;
        }
        write.commit().map_err(|e| self.disk(e))
    }

    fn parse<T: DeserializeOwned>(&self, bytes: &[u8], place: impl Fn() -> String) -> Result<T, StoreError> {
        serde_json::from_slice(bytes).map_err(|error| self.damaged(place(), error))
    }

    fn json(&self, value: &impl Serialize) -> Result<Vec<u8>, StoreError> {
        serde_json::to_vec(value).map_err(|error| self.damaged("a value to write", error))
    }

    fn read(&self) -> Result<State, StoreError> {
        let read = self.database.begin_read().map_err(|e| self.disk(e))?;
        let mut state = State::default();
        let meta = read.open_table(META).map_err(|e| self.disk(e))?;
        if let Some(bytes) = meta.get("state").map_err(|e| self.disk(e))? {
            state.meta = self.parse(bytes.value(), || "meta state".into())?;
        }
        let backends = read.open_table(BACKENDS).map_err(|e| self.disk(e))?;
        for row in backends.iter().map_err(|e| self.disk(e))? {
            let (key, value) = row.map_err(|e| self.disk(e))?;
            let backend = self.parse(value.value(), || place("backends", key.value()))?;
            state.backends.insert(BackendId(key.value()), backend);
        }
        let muxes = read.open_table(MUXES).map_err(|e| self.disk(e))?;
        for row in muxes.iter().map_err(|e| self.disk(e))? {
            let (key, value) = row.map_err(|e| self.disk(e))?;
            let mux = self.parse(value.value(), || place("muxes", key.value()))?;
            state.muxes.insert(key.value().to_owned(), mux);
        }
        let services = read.open_table(SERVICES).map_err(|e| self.disk(e))?;
        let blocks = read.open_table(BLOCKS).map_err(|e| self.disk(e))?;
        for row in services.iter().map_err(|e| self.disk(e))? {
            let (key, value) = row.map_err(|e| self.disk(e))?;
            let id = ServiceId(key.value());
            let record: ServiceRecord = self.parse(value.value(), || place("services", id))?;
            let count = record.service.buckets;
            if record.service.id != id || !is_bucket_count(count) {
                return Err(self.damaged(place("services", id), "contradicts its key or has no bucket count"));
            }
            let mut buckets = vec![Bucket::default(); count as usize];
            let range = block_key(id, 0)..=block_key(id, u32::MAX);
            for row in blocks.range(range).map_err(|e| self.disk(e))? {
                let (key, value) = row.map_err(|e| self.disk(e))?;
                let first = (key.value() as u32 as usize).saturating_mul(BLOCK);
                let place = || place("blocks", key.value());
                let room = buckets.get_mut(first..).unwrap_or_default();
                let room = room.chunks_mut(BLOCK).next();
                let room = room.ok_or_else(|| self.damaged(place(), "lies behind the table's end"))?;
                decode_block(value.value(), room).map_err(|why| self.damaged(place(), why))?;
            }
            state.services.insert(id, ServiceState::new(record, buckets));
        }
        Ok(state)
    }

    /// Writes a change, which is on the disk when this returns. `before` is the state that it is about to be made
    /// to.
    ///
    /// # Errors
    /// [`StoreError`]; then nothing of the change is in the store, or the disk's state is unknown: do not go on.
    pub fn commit(&self, before: &State, change: &Change) -> Result<(), StoreError> {
        // redb's default durability: commit returns after fsync.
        let write = self.database.begin_write().map_err(|e| self.disk(e))?;
        self.write(&write, before, change)?;
        write.commit().map_err(|e| self.disk(e))
    }

    fn write(&self, write: &WriteTransaction, before: &State, change: &Change) -> Result<(), StoreError> {
        if let Some(meta) = change.meta {
            let mut table = write.open_table(META).map_err(|e| self.disk(e))?;
            table.insert("state", &self.json(&meta)?[..]).map_err(|e| self.disk(e))?;
        }
        if !change.backends.is_empty() {
            let mut table = write.open_table(BACKENDS).map_err(|e| self.disk(e))?;
            for (id, backend) in &change.backends {
                match backend {
                    Some(backend) => table.insert(id.0, &self.json(backend)?[..]),
                    None => table.remove(id.0),
                }
                .map_err(|e| self.disk(e))?;
            }
        }
        if !change.muxes.is_empty() {
            let mut table = write.open_table(MUXES).map_err(|e| self.disk(e))?;
            for (name, mux) in &change.muxes {
                match mux {
                    Some(mux) => table.insert(&name[..], &self.json(mux)?[..]),
                    None => table.remove(&name[..]),
                }
                .map_err(|e| self.disk(e))?;
            }
        }
        for (id, change) in &change.services {
            let mut services = write.open_table(SERVICES).map_err(|e| self.disk(e))?;
            let mut blocks = write.open_table(BLOCKS).map_err(|e| self.disk(e))?;
            let Some(change) = change else {
                services.remove(id.0).map_err(|e| self.disk(e))?;
                blocks
                    .retain_in(block_key(*id, 0)..=block_key(*id, u32::MAX), |_, _| false)
                    .map_err(|e| self.disk(e))?;
                continue;
            };
            services.insert(id.0, &self.json(&change.record)?[..]).map_err(|e| self.disk(e))?;
            let old = before.services.get(id).map_or(&[][..], |service| &service.buckets);
            let block_of = |number: u32| number / BLOCK as u32;
            for changed in change.buckets.chunk_by(|a, b| block_of(a.0) == block_of(b.0)) {
                let block = block_of(changed[0].0);
                let first = block as usize * BLOCK;
                let end = old.len().min(first + BLOCK);
                blocks
                    .insert(block_key(*id, block), &encode_block(first, &old[first..end], changed)[..])
                    .map_err(|e| self.disk(e))?;
            }
        }
        Ok(())
    }
}

/// A block: the old buckets, and in their place those that changed.
fn encode_block(first: usize, old: &[Bucket], changed: &[(u32, Bucket)]) -> Vec<u8> {
    let mut out = Vec::with_capacity(old.len() * 17);
    let mut changed = changed.iter().peekable();
    for (i, old) in old.iter().enumerate() {
        let bucket = changed.next_if(|(number, _)| *number as usize == first + i).map_or(old, |(_, new)| new);
        out.extend_from_slice(&bucket.generation.0.to_be_bytes());
        out.push(bucket.links.len() as u8);
        for link in &bucket.links {
            out.extend_from_slice(&link.owner.0.to_be_bytes());
            out.extend_from_slice(&link.since.0.to_be_bytes());
        }
    }
    out
}

fn decode_block(mut bytes: &[u8], room: &mut [Bucket]) -> Result<(), &'static str> {
    const SHORT: &str = "ends too early";
    for bucket in room {
        bucket.generation = Generation(u32::from_be_bytes(take(&mut bytes).ok_or(SHORT)?));
        let [owners] = take(&mut bytes).ok_or(SHORT)?;
        let mut links = ArrayVec::new();
        for _ in 0..owners {
            let owner = BackendId(u16::from_be_bytes(take(&mut bytes).ok_or(SHORT)?));
            let since = Generation(u32::from_be_bytes(take(&mut bytes).ok_or(SHORT)?));
            links.try_push(Link { owner, since }).map_err(|_| "a chain is too long")?;
        }
        bucket.links = links;
    }
    if bytes.is_empty() { Ok(()) } else { Err("has bytes after its end") }
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (first, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(*first)
}
