//! Compiles a client for KEDA's protocol, without protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = "../src/statserver/proto";
    println!("cargo::rerun-if-changed={folder}");
    let descriptors = protox::compile(["externalscaler.proto"], [folder])?;
    tonic_prost_build::configure().build_server(false).build_transport(true).compile_fds(descriptors)?;
    Ok(())
}
