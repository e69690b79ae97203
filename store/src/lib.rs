//! The snapshot format and where it lies: chunk, pack, index, manifest, tags.
