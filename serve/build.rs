//! Makes Rust of `proto/externalscaler.proto`. The compiler is a library: nobody needs `protoc` to build this.

use std::io;

fn main() -> io::Result<()> {
    println!("cargo:rerun-if-changed=proto");
    let files = protox::compile(["proto/externalscaler.proto"], ["proto"]).map_err(io::Error::other)?;
    // The client is for tests and for programs of others; how it connects is theirs to say.
    tonic_prost_build::configure().build_transport(false).compile_fds(files)
}
