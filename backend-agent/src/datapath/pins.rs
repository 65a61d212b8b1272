//! Where the data path's maps and its link are pinned, so that they outlive the daemon:
//!
//! ```text
//! <bpffs>/daisy-agent/<interface>/link          the XDP program's attachment
//!                                 clsact        a folder: the clsact qdisc is ours
//!                                 v<LAYOUT>/    the maps, by name
//! ```

use std::io;
use std::path::{Path, PathBuf};
use std::{fs, net::Ipv4Addr};

use aya::maps::{Array, Map, MapData, MapInfo, MapType};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use tracing::info;

use super::error::DatapathError;
use super::layout;
use super::values::{Counters, KnowledgeValue, Link, PeerValue, ServiceKey, ServiceValue};

/// The pins of one interface.
#[derive(Clone, Debug)]
pub(super) struct Pins {
    bpffs: PathBuf,
    root: PathBuf,
}

impl Pins {
    /// The pins of an interface under a bpf filesystem.
    ///
    /// # Errors
    /// If `bpffs` is not one.
    pub fn new(bpffs: &Path, interface: &str) -> Result<Pins, DatapathError> {
        let is_bpffs = statfs(bpffs).is_ok_and(|stat| stat.filesystem_type() == BPF_FS_MAGIC);
        if !is_bpffs {
            return Err(DatapathError::NotBpffs(bpffs.to_owned()));
        }
        Ok(Pins { bpffs: bpffs.to_owned(), root: bpffs.join("daisy-agent").join(interface) })
    }

    /// The XDP program's attachment.
    pub fn link(&self) -> PathBuf {
        self.root.join("link")
    }

    /// Exists if the clsact qdisc was made by daisy.
    pub fn clsact(&self) -> PathBuf {
        self.root.join("clsact")
    }

    /// The folder of the maps.
    pub fn maps(&self) -> PathBuf {
        self.root.join(format!("v{}", layout::LAYOUT))
    }

    /// Makes the folder of the maps, and empties it if what lies there cannot be used: maps of another size, of
    /// another address (it says which buckets this agent is head of), or not all of them.
    ///
    /// # Errors
    /// What the filesystem says.
    pub fn prepare(&self, capacity: u32, address: Ipv4Addr) -> Result<(), DatapathError> {
        let folder = self.maps();
        fs::create_dir_all(&folder).map_err(|error| DatapathError::io(&folder, error))?;
        let found = fs::read_dir(&folder).map_err(|error| DatapathError::io(&folder, error))?.count();
        if found == 0 {
            return Ok(());
        }
        match self.usable(capacity, address) {
            Ok(()) => Ok(()),
            Err(why) => {
                info!(folder = %folder.display(), why, "pinned maps cannot be used; starting with new ones");
                self.remove(&folder)?;
                fs::create_dir_all(&folder).map_err(|error| DatapathError::io(&folder, error))
            }
        }
    }

    /// Whether the pinned maps are just as this version would make them.
    fn usable(&self, capacity: u32, address: Ipv4Addr) -> Result<(), String> {
        fn size<T>() -> u32 {
            size_of::<T>() as u32
        }
        let shapes = [
            ("link", MapType::Array, 4, size::<Link>(), 1),
            ("counters", MapType::PerCpuArray, 4, size::<Counters>(), 1),
            ("trusted", MapType::LpmTrie, 8, 4, layout::MAX_TRUSTED),
            ("services", MapType::Hash, size::<ServiceKey>(), size::<ServiceValue>(), layout::MAX_SERVICES),
            ("knowledge", MapType::Array, 4, size::<KnowledgeValue>(), capacity),
            ("briefs", MapType::Array, 4, layout::BRIEF_LEN as u32, capacity),
            ("peers", MapType::Hash, 4, size::<PeerValue>(), layout::MAX_PEERS),
        ];
        for (name, kind, key, value, entries) in shapes {
            let info =
                MapInfo::from_pin(self.maps().join(name)).map_err(|error| format!("{name}: {error}"))?;
            let found = (info.key_size(), info.value_size(), info.max_entries());
            if info.map_type().ok() != Some(kind) || found != (key, value, entries) {
                return Err(format!(
                    "{name} has keys of {} bytes, values of {} and {} entries, wanted are {key}, {value} and {entries}",
                    found.0, found.1, found.2
                ));
            }
        }
        let link = MapData::from_pin(self.maps().join("link")).map(Map::Array);
        let link = link.and_then(Array::<_, Link>::try_from).and_then(|link| link.get(&0, 0));
        match link {
            Ok(link) if link.address == address.octets() => Ok(()),
            Ok(link) => Err(format!("they belong to address {}", Ipv4Addr::from(link.address))),
            Err(error) => Err(format!("link: {error}")),
        }
    }

    /// Removes what older versions have left.
    ///
    /// # Errors
    /// What the filesystem says.
    pub fn remove_older(&self) -> Result<(), DatapathError> {
        let entries = fs::read_dir(&self.root).map_err(|error| DatapathError::io(&self.root, error))?;
        for entry in entries {
            let path = entry.map_err(|error| DatapathError::io(&self.root, error))?.path();
            let is_version = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('v'));
            if is_version && path != self.maps() {
                self.remove(&path)?;
            }
        }
        Ok(())
    }

    /// Removes everything of this interface.
    ///
    /// # Errors
    /// What the filesystem says.
    pub fn remove_all(&self) -> Result<(), DatapathError> {
        self.remove(&self.root)?;
        // Other interfaces may have their pins beside it.
        let parent = self.bpffs.join("daisy-agent");
        match fs::remove_dir(&parent) {
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result.map_err(|error| DatapathError::io(&parent, error)),
        }
    }

    fn remove(&self, folder: &Path) -> Result<(), DatapathError> {
        match fs::remove_dir_all(folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result.map_err(|error| DatapathError::io(folder, error)),
        }
    }
}
