//! What a boot object says has to be built: objects with pages, trees of files, image files. Checked before anything is
//! made from it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use rewarm_container::tree::Tree;
use rewarm_criu::layout::Layout;
use rewarm_criu::page_server::Object;
use rewarm_gpu::Process;
use rewarm_gpu::carried::Carried;
use rewarm_gpu::ranges::Range;
use rewarm_store::{Boot, RegionKind};

use crate::error::Cause;

/// Where a tree belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// The root file system's upper layer.
    Upper,
    /// `/dev/shm`.
    Shm,
}

/// A task or shared segment.
#[derive(Debug, Clone)]
pub(crate) struct ObjectRegion {
    pub(crate) region: usize,
    pub(crate) object: Object,
    pub(crate) layout: Arc<Layout>,
    /// Number of its pages image.
    pub(crate) pages_id: u32,
}

/// Device memory of a task, as it lies in the task's own memory until the driver takes it back.
#[derive(Debug, Clone)]
pub(crate) struct DeviceRegion {
    pub(crate) region: usize,
    pub(crate) pid: u32,
    pub(crate) layout: Arc<Layout>,
}

/// Device memory of a task on one device, which goes there without lying in the task's memory.
#[derive(Debug, Clone)]
pub(crate) struct DirectRegion {
    pub(crate) region: usize,
    pub(crate) pid: u32,
    pub(crate) gpu: String,
    /// Addresses are those on the device, counted from 0.
    pub(crate) layout: Arc<Layout>,
}

/// A snapshot's parts.
#[derive(Debug, Clone, Default)]
pub(crate) struct Blueprint {
    pub(crate) objects: Vec<ObjectRegion>,
    pub(crate) devices: Vec<DeviceRegion>,
    pub(crate) direct: Vec<DirectRegion>,
    /// Where the driver's copies lie, by the task's pid. More than has content: what the driver mapped and never touched, or what the
    /// kernel shows as its page of zeros, was not dumped.
    pub(crate) copies: BTreeMap<u32, Vec<Range>>,
    pub(crate) trees: Vec<(usize, Place, Arc<Tree>)>,
    /// Image files that are regions: region, name, length.
    pub(crate) files: Vec<(usize, String, u64)>,
    /// Image files of the skeleton.
    pub(crate) images: Vec<(String, Bytes)>,
}

impl Blueprint {
    /// Reads a boot object.
    pub(crate) fn of(boot: &Boot) -> Result<Self, Cause> {
        let mut blueprint = Self::default();
        for (region, stored) in boot.regions().iter().enumerate() {
            match &stored.kind {
                RegionKind::Task { pid } => {
                    blueprint.object(region, Object::Task { pid: *pid }, &stored.meta, stored.bytes)?
                }
                RegionKind::Shmem { id } => {
                    blueprint.object(region, Object::Shmem { id: *id }, &stored.meta, stored.bytes)?
                }
                RegionKind::Device { pid, gpu, direct } => {
                    let gpu = direct.then(|| gpu.clone().unwrap_or_default());
                    blueprint.device(region, *pid, gpu, &stored.meta, stored.bytes)?
                }
                RegionKind::Tree { name } => {
                    let place = match name.as_str() {
                        "upper" => Place::Upper,
                        "shm" => Place::Shm,
                        other => return Err(inconsistent(format!("there is no place for a tree {other:?}"))),
                    };
                    let tree = Tree::decode(&stored.meta)?;
                    same_length(name, tree.stream_bytes(), stored.bytes)?;
                    blueprint.trees.push((region, place, Arc::new(tree)));
                }
                RegionKind::File { name } => {
                    let bytes = stored.meta.as_ref().try_into().map(u64::from_le_bytes);
                    let bytes = bytes.map_err(|_| inconsistent(format!("image {name} has no length")))?;
                    if bytes > stored.bytes {
                        return Err(inconsistent(format!(
                            "image {name} has {bytes} bytes, its region {}",
                            stored.bytes
                        )));
                    }
                    blueprint.files.push((region, image_name(name)?, bytes));
                }
            }
        }
        for (name, bytes) in boot.skeleton() {
            blueprint.images.push((image_name(name)?, bytes.clone()));
        }
        Ok(blueprint)
    }

    /// The same with what the manifest says of the driver's copies.
    pub(crate) fn with_copies(mut self, carried: &Carried) -> Self {
        let of = |process: &Process| Some((u32::try_from(process.pid).ok()?, process.copies.clone()));
        self.copies = carried.processes.iter().filter_map(of).collect();
        self
    }

    /// `gpu` where it does not lie in the task's memory.
    fn device(
        &mut self,
        region: usize,
        pid: u32,
        gpu: Option<String>,
        meta: &[u8],
        bytes: u64,
    ) -> Result<(), Cause> {
        let what = format!("device memory of task {pid}");
        let layout = Layout::decode(meta).map_err(|error| inconsistent(format!("{what}: {error}")))?;
        same_length(&what, layout.stream_bytes(), bytes)?;
        if layout.runs().iter().any(|run| !run.lazy) {
            return Err(inconsistent(format!("{what} has pages that CRIU insists on")));
        }
        let layout = Arc::new(layout);
        if let Some(gpu) = gpu {
            self.direct.push(DirectRegion { region, pid, gpu, layout });
            return Ok(());
        }
        if self.devices.iter().any(|other| other.pid == pid) {
            return Err(inconsistent(format!("{what} is there twice")));
        }
        self.devices.push(DeviceRegion { region, pid, layout });
        Ok(())
    }

    fn object(&mut self, region: usize, object: Object, meta: &[u8], bytes: u64) -> Result<(), Cause> {
        let layout = Layout::decode(meta).map_err(|error| inconsistent(format!("{object}: {error}")))?;
        same_length(&object.to_string(), layout.stream_bytes(), bytes)?;
        if self.objects.iter().any(|other| other.object == object) {
            return Err(inconsistent(format!("{object} is there twice")));
        }
        let pages_id = u32::try_from(self.objects.len() + 1).expect("the store limits the number of regions");
        self.objects.push(ObjectRegion { region, object, layout: Arc::new(layout), pages_id });
        Ok(())
    }
}

/// A name that lies in the image directory and is none that Rewarm writes itself.
fn image_name(name: &str) -> Result<String, Cause> {
    let plain = Path::new(name).file_name().is_some_and(|file| file == name) && !name.contains('/');
    let ours = name.starts_with("pages-") || name.starts_with("pagemap-");
    if plain && !ours && name.len() <= 255 {
        Ok(name.to_owned())
    } else {
        Err(inconsistent(format!("{name:?} is not the name of an image file")))
    }
}

fn same_length(what: &str, meta: u64, region: u64) -> Result<(), Cause> {
    if meta == region {
        return Ok(());
    }
    Err(inconsistent(format!("{what} describes {meta} bytes, its region has {region}")))
}

fn inconsistent(what: String) -> Cause {
    Cause::Inconsistent { what }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_lead_out_of_the_image_directory_are_refused() {
        for bad in ["", ".", "..", "a/b", "/etc/passwd", "../x", "pages-1.img", "pagemap-1.img"] {
            assert!(image_name(bad).is_err(), "{bad}");
        }
        assert_eq!(image_name("core-1.img").expect("fine"), "core-1.img");
    }
}
