//! Speaks CRIU: command line, image files, page-server and lazy-pages protocols.
