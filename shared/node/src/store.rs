//! The last good directory and tables, on disk, so that a node starts and works when no controller answers.
//!
//! One file each: `directory.state` and `service-<id>.state`. A file is one line,
//! `daisy-state 1 <CRC-32 of the rest, hexadecimal>`, and JSON: a [`Directory`], or a [`TableUpdate`] with a
//! snapshot. Files are replaced whole (written beside, synced, renamed), so that a crash leaves the old or the
//! new one; what is damaged all the same is noticed by its checksum, reported and never used.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use daisy_shared::control::{Directory, TableUpdate};
use daisy_shared::service::ServiceId;
use serde::de::DeserializeOwned;
use tracing::{error, info};

const HEADER: &str = "daisy-state 1 ";
/// `HEADER`, eight digits and a line feed.
const HEADER_LEN: usize = HEADER.len() + 9;
const DIRECTORY: &str = "directory.state";
/// How long the writer waits after the disk refused before it tries again.
const RETRY: Duration = Duration::from_secs(5);

/// What lay on the disk.
#[derive(Debug, Default)]
pub struct Loaded {
    /// The directory.
    pub directory: Option<Directory>,
    /// Services with their tables, in the order of their numbers.
    pub tables: Vec<TableUpdate>,
    /// Files that cannot be used, and why.
    pub damaged: Vec<(PathBuf, String)>,
}

/// Reads what lies in a state directory. One that does not exist is empty.
///
/// # Errors
/// If the directory exists and cannot be read.
pub fn load(dir: &Path) -> io::Result<Loaded> {
    let mut loaded = Loaded::default();
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(loaded),
        entries => entries?,
    };
    for entry in entries {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let result = if name == DIRECTORY {
            read(&path).map(|directory| loaded.directory = Some(directory))
        } else if let Some(id) = service_of(&name) {
            read_table(&path, id).map(|table| loaded.tables.push(table))
        } else {
            continue;
        };
        if let Err(reason) = result {
            loaded.damaged.push((path, reason));
        }
    }
    loaded.tables.sort_by_key(|table| table.service.id);
    Ok(loaded)
}

fn service_of(file_name: &str) -> Option<ServiceId> {
    file_name.strip_prefix("service-")?.strip_suffix(".state")?.parse().ok().map(ServiceId)
}

fn file_name(service: ServiceId) -> String {
    format!("service-{service}.state")
}

fn read_table(path: &Path, id: ServiceId) -> Result<TableUpdate, String> {
    let table: TableUpdate = read(path)?;
    let (service, piece) = (&table.service, &table.piece);
    if service.id != id || piece.service != id {
        return Err(format!("holds service {} with the table of service {}", service.id, piece.service));
    }
    if piece.buckets != service.buckets || piece.from.is_some() {
        return Err("holds a table that does not fit its service".into());
    }
    Ok(table)
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<T, String> {
    let bytes = fs::read(path).map_err(|error| error.to_string())?;
    let (header, body) = bytes.split_at_checked(HEADER_LEN).ok_or("is cut short")?;
    let checksum = std::str::from_utf8(header)
        .ok()
        .and_then(|header| header.strip_prefix(HEADER)?.strip_suffix('\n'))
        .and_then(|digits| u32::from_str_radix(digits, 16).ok())
        .ok_or("does not begin like a state file of this version")?;
    let found = crc32fast::hash(body);
    if found != checksum {
        return Err(format!("its checksum is {found:08x}, should be {checksum:08x}"));
    }
    serde_json::from_slice(body).map_err(|error| error.to_string())
}

/// What is to be done to a file.
enum Job {
    Directory(Directory),
    Table(TableUpdate),
    Remove,
}

/// Writes a state directory from a thread of its own, so that a slow disk holds nothing up. Of several states of
/// one file that wait, only the newest is written. What waits when the store is dropped is written first.
pub struct Store {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    /// By file name. `directory.state` sorts before the services, and so is written before tables that need it.
    jobs: BTreeMap<String, Job>,
    ending: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store {
    /// A store that writes to this directory, which is made when there is something to write. A disk that
    /// refuses is reported in the log, once, and tried again.
    ///
    /// # Errors
    /// If the kernel gives no thread.
    pub fn open(dir: &Path) -> io::Result<Store> {
        let shared = Arc::new(Shared { queue: Mutex::default(), changed: Condvar::new() });
        let writer = Writer { dir: dir.to_owned(), shared: shared.clone(), failing: false };
        let thread = std::thread::Builder::new().name("store".into()).spawn(move || writer.run())?;
        Ok(Store { shared, thread: Some(thread) })
    }

    /// Has the directory written.
    pub fn save_directory(&self, directory: Directory) {
        self.enqueue(DIRECTORY.into(), Job::Directory(directory));
    }

    /// Has a service and the snapshot of its table written.
    pub fn save_table(&self, table: TableUpdate) {
        self.enqueue(file_name(table.service.id), Job::Table(table));
    }

    /// Has a service's file removed.
    pub fn remove(&self, service: ServiceId) {
        self.enqueue(file_name(service), Job::Remove);
    }

    fn enqueue(&self, file: String, job: Job) {
        self.shared.lock().jobs.insert(file, job);
        self.shared.changed.notify_one();
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.shared.lock().ending = true;
        self.shared.changed.notify_one();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            error!("the store's writer panicked");
        }
    }
}

struct Writer {
    dir: PathBuf,
    shared: Arc<Shared>,
    /// The disk refused last time, and the log says so.
    failing: bool,
}

impl Writer {
    fn run(mut self) {
        loop {
            let mut queue = self.shared.lock();
            let (file, job) = loop {
                if let Some(job) = queue.jobs.pop_first() {
                    break job;
                }
                if queue.ending {
                    return;
                }
                queue = self.shared.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
            };
            drop(queue);
            let result = self.carry_out(&file, &job);
            match result {
                Ok(()) if self.failing => {
                    info!(dir = %self.dir.display(), "state is written to disk again");
                    self.failing = false;
                }
                Ok(()) => {}
                Err(error) => {
                    if !self.failing {
                        let path = self.dir.join(&file);
                        error!(file = %path.display(), %error, "state cannot be written to disk; going on without");
                        self.failing = true;
                    }
                    let mut queue = self.shared.lock();
                    if !queue.ending {
                        // Unless there is a newer state by now.
                        queue.jobs.entry(file).or_insert(job);
                        let ended = |queue: &mut Queue| !queue.ending;
                        let _woken = self.shared.changed.wait_timeout_while(queue, RETRY, ended);
                    }
                }
            }
        }
    }

    fn carry_out(&self, file: &str, job: &Job) -> io::Result<()> {
        let path = self.dir.join(file);
        match job {
            Job::Directory(directory) => write(&path, &serde_json::to_vec(directory)?),
            Job::Table(table) => write(&path, &serde_json::to_vec(table)?),
            Job::Remove => match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            },
        }
    }
}

/// Replaces a file whole, and makes its directory if there is none.
fn write(path: &Path, body: &[u8]) -> io::Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(dir)?;
    let new = path.with_extension("new");
    // Nobody else's business: tables come with the keys of flow hashes.
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(format!("{HEADER}{:08x}\n", crc32fast::hash(body)).as_bytes())?;
    file.write_all(body)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use daisy_shared::bucket::{BackendId, Chain, Entry, Piece};
    use daisy_shared::chain::Generation;
    use daisy_shared::flow::HashKey;
    use daisy_shared::service::{Encapsulation, Protocol, Service};

    fn table(id: u32, generation: u32) -> TableUpdate {
        let service = Service {
            id: ServiceId(id),
            name: format!("service-{id}"),
            vip: "203.0.113.1".parse().unwrap(),
            protocol: Protocol::Tcp,
            port: 80,
            buckets: 16,
            hash_key: HashKey([7; 16]),
            encapsulation: Encapsulation::Gue,
        };
        let chain = Chain::from_iter([BackendId(1)]);
        let entries = vec![Entry { bucket: 3, generation: Generation(generation), chain }];
        let piece = Piece {
            service: service.id,
            from: None,
            generation: Generation(generation),
            buckets: 16,
            entries,
        };
        TableUpdate { service, piece }
    }

    #[test]
    fn what_is_saved_is_loaded() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("not/there/yet");
        assert!(load(&dir).unwrap().directory.is_none());
        let directory = Directory { version: 4, ..Directory::default() };
        let store = Store::open(&dir).unwrap();
        store.save_directory(directory.clone());
        for (id, generation) in [(10, 1), (2, 1), (10, 2), (3, 1)] {
            store.save_table(table(id, generation));
        }
        store.remove(ServiceId(3));
        store.remove(ServiceId(4));
        drop(store);
        let loaded = load(&dir).unwrap();
        assert_eq!(loaded.directory, Some(directory));
        assert_eq!(loaded.tables, [table(2, 1), table(10, 2)]);
        assert_eq!(loaded.damaged, []);
    }

    #[test]
    fn damage_is_reported_by_name_and_never_served() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        store.save_directory(Directory::default());
        store.save_table(table(1, 1));
        drop(store);
        let path = dir.path().join("service-1.state");
        let good = fs::read(&path).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            for bytes in [&bad[..], &good[..at]] {
                fs::write(&path, bytes).unwrap();
                let loaded = load(dir.path()).unwrap();
                // Upper case in the checksum's digits is the same checksum; no single flipped bit makes it so.
                assert_eq!(loaded.tables, [], "byte {at}");
                assert_eq!(loaded.damaged.len(), 1);
                assert_eq!(loaded.damaged[0].0, path);
                assert!(loaded.directory.is_some());
            }
        }
        // One service's file under another's name.
        fs::write(&path, &good).unwrap();
        fs::rename(&path, dir.path().join("service-2.state")).unwrap();
        let loaded = load(dir.path()).unwrap();
        assert_eq!((loaded.tables.len(), loaded.damaged.len()), (0, 1));
    }

    #[test]
    fn a_disk_that_refuses_holds_nothing_up_and_is_tried_again() {
        let root = tempfile::tempdir().unwrap();
        // A file where the directory should be.
        let dir = root.path().join("state");
        fs::write(&dir, "").unwrap();
        let store = Store::open(&dir).unwrap();
        store.save_table(table(1, 1));
        store.save_table(table(2, 1));
        drop(store);
        assert!(dir.is_file());
    }
}
