//! runc bundles, root file system, namespaces, the shim.
