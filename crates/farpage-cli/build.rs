//! Builds the library that `farpage run` injects (the crate `farpage-preload`) and hands its path to
//! `src/run/library.rs`, which carries it inside the command.
//!
//! It is a nested `cargo build` with its own target directory, so that `cargo build`, `cargo test` and
//! `cargo install --path` all give one self-contained binary. `FARPAGE_PRELOAD=PATH` in the environment
//! takes a library that is already built instead.

use std::env;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Variables beginning with `CARGO_` that the nested build must see: where crates come from, how the
/// profile was changed by the user, and the job server that limits how many compilers run.
const KEEP: &[&str] = &[
    "CARGO_HOME",
    "CARGO_NET_",
    "CARGO_HTTP_",
    "CARGO_REGISTR",
    "CARGO_SOURCE_",
    "CARGO_PROFILE_",
    "CARGO_INCREMENTAL",
    "CARGO_MAKEFLAGS",
    "CARGO_TERM_",
];

/// Variables that would change how the nested build compiles: flags meant for this crate, and clippy's
/// or rustc's wrapper around it.
const DROP: &[&str] = &[
    "RUSTFLAGS",
    "RUSTDOCFLAGS",
    "RUSTC_WORKSPACE_WRAPPER",
    "CLIPPY_ARGS",
    "CLIPPY_CONF_DIR",
    "TARGET",
    "HOST",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-env-changed=FARPAGE_PRELOAD");
    let library = match env::var_os("FARPAGE_PRELOAD") {
        Some(path) if !path.is_empty() => PathBuf::from(path).canonicalize()?,
        _ => build()?,
    };
    println!("cargo:rerun-if-changed={}", library.display());
    println!("cargo:rustc-env=FARPAGE_PRELOAD_LIBRARY={}", library.display());
    Ok(())
}

/// Builds the library; gives its path.
fn build() -> Result<PathBuf, Box<dyn Error>> {
    let here = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let crates = here.parent().ok_or("the crate has no parent directory")?;
    let preload = crates.join("farpage-preload");
    let manifest = preload.join("Cargo.toml");
    for path in [
        manifest.clone(),
        preload.join("src"),
        preload.join("build.rs"),
        crates.join("farpage/Cargo.toml"),
        crates.join("farpage/src"),
        crates.join("../Cargo.toml"),
        crates.join("../Cargo.lock"),
    ] {
        // Cargo runs the script every time if a path is named that does not exist.
        if path.exists() {
            println!("cargo:rerun-if-changed={}", path.display());
        }
    }

    let target_dir = PathBuf::from(env::var("OUT_DIR")?).join("preload");
    // The programs are glibc programs, also where the command itself is linked with musl.
    let target = env::var("TARGET")?.replace("-musl", "-gnu");
    let release = env::var("PROFILE")? == "release";

    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.arg("build").arg("--lib").arg("--manifest-path").arg(&manifest);
    cargo.arg("--target-dir").arg(&target_dir).arg("--target").arg(&target);
    cargo.arg("--profile").arg(if release { "release" } else { "dev" });
    for (name, _) in env::vars_os() {
        let Some(text) = name.to_str() else { continue };
        let cargos =
            text.starts_with("CARGO") && text != "CARGO" && !KEEP.iter().any(|k| text.starts_with(k));
        let clippy = text == "RUSTC_WRAPPER"
            && env::var_os("RUSTC_WRAPPER").is_some_and(|w| w.to_string_lossy().contains("clippy"));
        if cargos || clippy || DROP.contains(&text) {
            cargo.env_remove(&name);
        }
    }
    if release && env::var_os("CARGO_PROFILE_RELEASE_STRIP").is_none() {
        cargo.env("CARGO_PROFILE_RELEASE_STRIP", "debuginfo");
    }
    // Standard output belongs to the build script's own messages to cargo.
    let output = cargo.output()?;
    if !output.status.success() {
        return Err(format!(
            "building the injected library failed ({}):\n{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        )
        .into());
    }
    find(&target_dir, &target, if release { "release" } else { "debug" })
}

/// Where cargo put the library.
fn find(target_dir: &Path, target: &str, profile: &str) -> Result<PathBuf, Box<dyn Error>> {
    let path = target_dir.join(target).join(profile).join("libfarpage_preload.so");
    if path.is_file() { Ok(path) } else { Err(format!("{} was not built", path.display()).into()) }
}
