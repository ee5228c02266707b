//! Compiles the .proto files with `protox`, in Rust: a build needs no `protoc`.

use std::path::PathBuf;
use std::{env, fs};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let mut compiler = protox::Compiler::new(["proto"])?;
    compiler.include_source_info(true).include_imports(true);
    compiler.open_files(["flux/kv/v1/kv.proto"])?;

    // The generated code takes comments from the source positions; reflection has no use for those.
    tonic_prost_build::configure().bytes(".").compile_fds(compiler.file_descriptor_set())?;

    compiler.include_source_info(false);
    let output = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    fs::write(output.join("descriptors.bin"), compiler.encode_file_descriptor_set())?;
    Ok(())
}
