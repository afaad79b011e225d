//! redis-server, filled beyond its budget: read back by key, saved by BGSAVE (a fork) while it is written, and the
//! saved file loaded again by a plain server.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use farpage_tests::{Expect, Job, Rng, Running, Verdict, need, plain_only, suite};

const KEYS: u64 = 40_000;
const BATCH: u64 = 200;

fn said(e: std::io::Error) -> String {
    if e.kind() == std::io::ErrorKind::WouldBlock {
        "the server does not answer".to_owned()
    } else {
        e.to_string()
    }
}

/// A connection that speaks RESP, as much of it as this test needs.
struct Client(BufReader<UnixStream>);

impl Client {
    fn connect(socket: &Path) -> Result<Self, String> {
        let stream = UnixStream::connect(socket).map_err(|e| e.to_string())?;
        stream.set_read_timeout(Some(Duration::from_secs(60))).map_err(|e| e.to_string())?;
        Ok(Self(BufReader::new(stream)))
    }

    fn send(&mut self, commands: &[Vec<Vec<u8>>]) -> Result<(), String> {
        let mut bytes = Vec::new();
        for command in commands {
            bytes.extend(format!("*{}\r\n", command.len()).bytes());
            for word in command {
                bytes.extend(format!("${}\r\n", word.len()).bytes());
                bytes.extend(word);
                bytes.extend(b"\r\n");
            }
        }
        self.0.get_mut().write_all(&bytes).map_err(said)
    }

    /// The next reply: a simple string, an integer or a bulk string.
    fn reply(&mut self) -> Result<Vec<u8>, String> {
        let mut line = String::new();
        self.0.read_line(&mut line).map_err(said)?;
        let line = line.trim_end();
        match line.split_at_checked(1) {
            Some(("+" | ":", rest)) => Ok(rest.as_bytes().to_vec()),
            Some(("$", len)) => {
                let len: usize = len.parse().map_err(|_| format!("no value: {line}"))?;
                let mut bytes = vec![0; len + 2];
                self.0.read_exact(&mut bytes).map_err(said)?;
                bytes.truncate(len);
                Ok(bytes)
            }
            _ => Err(format!("reply: {line:?}")),
        }
    }

    fn ask(&mut self, words: &[&str]) -> Result<Vec<u8>, String> {
        self.send(&[words.iter().map(|w| w.as_bytes().to_vec()).collect()])?;
        self.reply()
    }

    fn set(&mut self, keys: impl Iterator<Item = u64>, round: u64) -> Result<(), String> {
        let keys: Vec<u64> = keys.collect();
        for keys in keys.chunks(BATCH as usize) {
            let commands: Vec<_> =
                keys.iter().map(|k| vec![b"SET".to_vec(), name(*k), value(*k, round)]).collect();
            self.send(&commands)?;
            for _ in keys {
                self.reply()?;
            }
        }
        Ok(())
    }

    /// Every key holds the value of the round that `round` names for it.
    fn check(&mut self, round: impl Fn(u64) -> u64, what: &str) -> Result<(), String> {
        // Not in the order in which they were written.
        let keys: Vec<u64> = (0..KEYS).map(|n| n * 7919 % KEYS).collect();
        for keys in keys.chunks(BATCH as usize) {
            let commands: Vec<_> = keys.iter().map(|k| vec![b"GET".to_vec(), name(*k)]).collect();
            self.send(&commands)?;
            for key in keys {
                if self.reply()? != value(*key, round(*key)) {
                    return Err(format!(
                        "{what}: key {key} does not hold the value of round {}",
                        round(*key)
                    ));
                }
            }
        }
        Ok(())
    }
}

fn name(key: u64) -> Vec<u8> {
    format!("key:{key}").into_bytes()
}

/// 1 KiB, half of it random.
fn value(key: u64, round: u64) -> Vec<u8> {
    let mut rng = Rng::new(key << 8 | round);
    let mut bytes = Vec::with_capacity(1024);
    for _ in 0..64 {
        bytes.extend(rng.draw().to_le_bytes());
    }
    bytes.resize(1024, key as u8);
    bytes
}

/// Every fourth key is written again during the save.
fn again(key: u64) -> bool {
    key % 4 == 1
}

fn job(server: &Path, dir: &Path) -> Job {
    let mut argv: Vec<std::ffi::OsString> = vec![server.into()];
    for word in
        ["--port", "0", "--save", "", "--appendonly", "no", "--dbfilename", "dump.rdb", "--daemonize", "no"]
    {
        argv.push(word.into());
    }
    argv.extend(["--unixsocket".into(), dir.join("socket").into(), "--dir".into(), dir.into()]);
    Job::new(argv).dir(dir).dram("16M").expect(Expect::PAGED)
}

fn ready(running: &Running, dir: &Path) -> Result<Client, String> {
    running.wait_for(false, |text| text.to_lowercase().contains("ready to accept connections"))?;
    Client::connect(&dir.join("socket"))
}

fn stop(mut client: Client) {
    // The server ends instead of answering.
    let _ = client.ask(&["SHUTDOWN", "NOSAVE"]);
}

fn redis() -> Result<Verdict, String> {
    let server = match need::tool("redis-server") {
        Ok(server) => server,
        Err(why) => return Ok(Verdict::Skipped(why)),
    };
    let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
    let job = job(&server, dir.path());
    let running = if plain_only() { job.start_plain()? } else { job.start_farpage()? };
    let mut client = ready(&running, dir.path())?;
    let hung = |e: String| if plain_only() { e } else { format!("{e}\n{}", running.describe()) };
    client.set(0..KEYS, 1).map_err(hung)?;
    client.check(|_| 1, "after filling").map_err(hung)?;
    let started = client.ask(&["BGSAVE"])?;
    if started != b"Background saving started" {
        return Err(format!("BGSAVE: {}", String::from_utf8_lossy(&started)));
    }
    client.set((0..KEYS).filter(|k| again(*k)), 2).map_err(hung)?;
    running.wait_for(false, |text| text.contains("Background saving terminated"))?;
    client.check(|k| if again(k) { 2 } else { 1 }, "after saving").map_err(hung)?;
    stop(client);
    let outcome = running.finish()?;
    if outcome.status != 0 {
        return Err(format!("status {}\n{}", outcome.status, outcome.tail()));
    }
    if !plain_only() {
        job_expects(&outcome)?;
    }
    let said = String::from_utf8_lossy(&outcome.stdout);
    if !said.contains("Background saving terminated with success") {
        return Err(format!("the save failed:\n{said}"));
    }
    // A plain server reads the file: every key as it was at the moment of BGSAVE.
    let plain = job.start_plain()?;
    let mut client = ready(&plain, dir.path())?;
    let size = client.ask(&["DBSIZE"])?;
    if size != KEYS.to_string().as_bytes() {
        return Err(format!("the saved file holds {} keys", String::from_utf8_lossy(&size)));
    }
    client.check(|_| 1, "from the saved file")?;
    stop(client);
    plain.finish()?;
    Ok(Verdict::Passed)
}

fn job_expects(outcome: &farpage_tests::Outcome) -> Result<(), String> {
    let stats = outcome.stats.as_ref().ok_or("farpage left no stats")?;
    Expect::PAGED.check(stats).map_err(|e| format!("{e}\n{}", outcome.tail()))
}

fn main() -> ExitCode {
    suite(vec![("programs::redis".to_owned(), Box::new(redis))])
}
