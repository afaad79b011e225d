//! Real programs with several times their DRAM: output and exit status as in a plain run.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use farpage_tests::{Expect, Job, MIB, Rng, Verdict, need, run_both, suite};

/// Returns the value, or leaves with a skip.
macro_rules! need {
    ($what:expr) => {
        match $what {
            Ok(it) => it,
            Err(why) => return Ok(Verdict::Skipped(why)),
        }
    };
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("programs").join(name)
}

fn io(e: std::io::Error) -> String {
    e.to_string()
}

/// 32 MiB of lines, sorted within 12 MiB.
fn sort() -> Result<Verdict, String> {
    let sort = need!(need::tool("sort"));
    let dir = tempfile::tempdir().map_err(io)?;
    let path = dir.path().join("lines");
    let mut file = std::io::BufWriter::new(std::fs::File::create(&path).map_err(io)?);
    let mut rng = Rng::new(1);
    let mut written = 0;
    while written < 32 * MIB {
        let line = format!(
            "{:016x} {:08} the rest of the line, {}\n",
            rng.draw(),
            rng.below(1 << 26),
            "- ".repeat(30)
        );
        file.write_all(line.as_bytes()).map_err(io)?;
        written += line.len() as u64;
    }
    file.into_inner().map_err(|e| e.to_string())?;
    let one = Job::new([
        sort.as_os_str(),
        "-S".as_ref(),
        "512M".as_ref(),
        "--parallel=2".as_ref(),
        path.as_os_str(),
    ]);
    run_both(&one, "12M")
}

/// An array of four times the budget, sorted; matrices of as much, multiplied.
fn numpy() -> Result<Verdict, String> {
    let python = need!(need::python_with_numpy());
    let job = Job::new([python.into_os_string(), script("numpy_job.py").into(), "64".into()]);
    run_both(&job.env("OPENBLAS_NUM_THREADS", "2"), "16M")
}

fn perl() -> Result<Verdict, String> {
    let perl = need!(need::tool("perl"));
    run_both(&Job::new([perl.into_os_string(), script("hash_job.pl").into(), "70000".into()]), "12M")
}

fn sqlite() -> Result<Verdict, String> {
    let sqlite = need!(need::tool("sqlite3"));
    let read = format!(".read {}", script("memory.sql").display());
    run_both(&Job::new([sqlite.into_os_string(), ":memory:".into(), read.into()]), "16M")
}

/// A tree of short processes: make starts compilers, two at a time, and the program that comes out is run.
fn gcc() -> Result<Verdict, String> {
    let make = need!(need::tool("make"));
    need!(need::tool("gcc"));
    let dir = tempfile::tempdir().map_err(io)?;
    const FILES: u64 = 16;
    let mut objects = String::new();
    let mut main = "#include <stdio.h>\n".to_owned();
    let mut calls = String::new();
    for n in 0..FILES {
        std::fs::write(dir.path().join(format!("f{n}.c")), source(n)).map_err(io)?;
        let _ = write!(objects, " f{n}.o");
        let _ = writeln!(main, "unsigned long f{n}(unsigned long);");
        let _ = writeln!(calls, "    x = f{n}(x);");
    }
    let _ = write!(
        main,
        "int main(void) {{\n    unsigned long x = 1;\n{calls}    printf(\"%lx\\n\", x);\n    return 0;\n}}\n"
    );
    std::fs::write(dir.path().join("main.c"), main).map_err(io)?;
    let makefile = format!(
        ".PHONY: all\nall: program\n\t@./program\n\t@cat main.o{objects} | cksum\n\
         program: main.o{objects}\n\t@gcc -o $@ $^\n%.o: %.c\n\t@gcc -O2 -g0 -c -o $@ $<\n"
    );
    std::fs::write(dir.path().join("Makefile"), makefile).map_err(io)?;
    let job = Job::new([make.as_os_str(), "-s".as_ref(), "-j2".as_ref(), "-B".as_ref()]).dir(dir.path());
    run_both(&job.expect(Expect::PAGED), "16M")
}

/// A C file of many functions.
fn source(n: u64) -> String {
    let mut rng = Rng::new(n);
    let mut text =
        "#include <math.h>\n#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n".to_owned();
    for f in 0..120 {
        let (a, b, c) = (rng.draw(), rng.below(63) + 1, rng.below(40) + 3);
        let _ = write!(
            text,
            "static unsigned long g{f}(unsigned long x) {{\n    unsigned long t[{c}] = {{0}};\n    \
             for (unsigned i = 0; i < {c}; i++) t[i] = (x ^ {a}u) * (i + {f}) >> (i % {b} / 2);\n    \
             switch (x % 5) {{\n    case 0: x += t[1]; break;\n    case 1: x ^= t[2] << 3; break;\n    \
             default: for (unsigned i = 0; i < {c}; i++) x = x * 31 + t[i];\n    }}\n    return x;\n}}\n"
        );
    }
    let _ = writeln!(text, "unsigned long f{n}(unsigned long x) {{");
    for f in 0..120 {
        let _ = writeln!(text, "    x = g{f}(x);");
    }
    text + "    return x;\n}\n"
}

fn main() -> ExitCode {
    suite(vec![
        ("programs::sort".to_owned(), Box::new(sort)),
        ("programs::numpy".to_owned(), Box::new(numpy)),
        ("programs::perl".to_owned(), Box::new(perl)),
        ("programs::sqlite".to_owned(), Box::new(sqlite)),
        ("programs::gcc".to_owned(), Box::new(gcc)),
    ])
}
