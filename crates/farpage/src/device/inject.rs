//! `inject:RULES:SPEC`: another device with faults injected, to test what happens then.
//!
//! `RULES` is a comma-separated list. Store and load *operations* are pages, counted from 1 over all processes of
//! the domain. `WHEN` is `N` (the Nth only), `NxM` (M of them from the Nth on), `N+` (all from the Nth on), `*`
//! (all) or `%N` (every Nth).
//!
//! | rule | effect |
//! |---|---|
//! | `fail-store=WHEN` | the store fails with EIO; nothing is stored |
//! | `fail-load=WHEN` | the load fails with EIO |
//! | `full=WHEN` | the store fails because the device is full; nothing is stored |
//! | `full-after=N` | all stores after the Nth fail because the device is full |
//! | `corrupt-load=WHEN` | the load returns the page with one byte changed: the checksum does not fit |
//! | `corrupt-store=WHEN` | the page is stored with one byte changed: every load of it is corrupt |
//! | `delay=TIME` | every batch, stored or loaded, takes TIME longer (`50us`, `2ms`, `1s`) |
//! | `delay-store=TIME`, `delay-load=TIME` | the same for one direction |

use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use super::{Device, DeviceError, LoadOp, StoreOp, Sum, Usage};
use crate::Page;
use crate::frame::{Owner, Pfn};
use crate::sys::SharedArea;

/// Which operations of a kind a rule means, counted from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum When {
    /// `count` operations from number `first` on.
    From {
        /// The first.
        first: u64,
        /// How many; `None`: all that follow.
        count: Option<u64>,
    },
    /// Every nth.
    Every(u64),
}

impl When {
    fn hits(self, n: u64) -> bool {
        match self {
            Self::From { first, count } => n >= first && count.is_none_or(|count| n - first < count),
            Self::Every(each) => n.is_multiple_of(each),
        }
    }
}

/// What a rule does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
enum Rule {
    FailStore(When),
    FailLoad(When),
    Full(When),
    FullAfter(u64),
    CorruptLoad(When),
    CorruptStore(When),
    Delay(Duration),
    DelayStore(Duration),
    DelayLoad(Duration),
}

/// A list of rules, at least one.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Rules(Vec<Rule>);

/// Why a text is not a list of rules.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RulesError {
    /// No such rule.
    #[error("unknown rule `{0}`")]
    Unknown(String),
    /// The value is not what the rule takes.
    #[error("rule `{0}` takes {1}")]
    Value(String, &'static str),
}

fn parse_when(text: &str) -> Option<When> {
    let number = |text: &str| text.parse::<u64>().ok().filter(|n| *n > 0 && text.as_bytes()[0] != b'+');
    if text == "*" {
        return Some(When::From { first: 1, count: None });
    }
    if let Some(each) = text.strip_prefix('%') {
        return number(each).map(When::Every);
    }
    if let Some(first) = text.strip_suffix('+') {
        return Some(When::From { first: number(first)?, count: None });
    }
    let (first, count) = text.split_once('x').unwrap_or((text, "1"));
    Some(When::From { first: number(first)?, count: Some(number(count)?) })
}

fn parse_time(text: &str) -> Option<Duration> {
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit())?);
    let number: u64 = number.parse().ok()?;
    match unit {
        "us" => Some(Duration::from_micros(number)),
        "ms" => Some(Duration::from_millis(number)),
        "s" => Some(Duration::from_secs(number)),
        _ => None,
    }
}

impl FromStr for Rule {
    type Err = RulesError;

    fn from_str(text: &str) -> Result<Self, RulesError> {
        let unknown = || RulesError::Unknown(text.to_owned());
        let (name, value) = text.split_once('=').ok_or_else(unknown)?;
        let when = |rule: fn(When) -> Self| parse_when(value).map(rule).ok_or("N, NxM, N+, * or %N (from 1)");
        let time =
            |rule: fn(Duration) -> Self| parse_time(value).map(rule).ok_or("a time such as 50us, 2ms or 1s");
        match name {
            "fail-store" => when(Self::FailStore),
            "fail-load" => when(Self::FailLoad),
            "full" => when(Self::Full),
            "full-after" => value.parse().map(Self::FullAfter).map_err(|_| "a number of pages"),
            "corrupt-load" => when(Self::CorruptLoad),
            "corrupt-store" => when(Self::CorruptStore),
            "delay" => time(Self::Delay),
            "delay-store" => time(Self::DelayStore),
            "delay-load" => time(Self::DelayLoad),
            _ => return Err(unknown()),
        }
        .map_err(|takes| RulesError::Value(text.to_owned(), takes))
    }
}

impl FromStr for Rules {
    type Err = RulesError;

    fn from_str(text: &str) -> Result<Self, RulesError> {
        text.split(',').map(str::parse).collect::<Result<_, _>>().map(Self)
    }
}

impl fmt::Display for When {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::From { first, count: Some(1) } => write!(f, "{first}"),
            Self::From { first, count: Some(count) } => write!(f, "{first}x{count}"),
            Self::From { first: 1, count: None } => write!(f, "*"),
            Self::From { first, count: None } => write!(f, "{first}+"),
            Self::Every(each) => write!(f, "%{each}"),
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = |d: &Duration| match (d.subsec_micros() % 1000, d.subsec_millis()) {
            (0, 0) => format!("{}s", d.as_secs()),
            (0, _) => format!("{}ms", d.as_millis()),
            _ => format!("{}us", d.as_micros()),
        };
        match self {
            Self::FailStore(when) => write!(f, "fail-store={when}"),
            Self::FailLoad(when) => write!(f, "fail-load={when}"),
            Self::Full(when) => write!(f, "full={when}"),
            Self::FullAfter(n) => write!(f, "full-after={n}"),
            Self::CorruptLoad(when) => write!(f, "corrupt-load={when}"),
            Self::CorruptStore(when) => write!(f, "corrupt-store={when}"),
            Self::Delay(d) => write!(f, "delay={}", time(d)),
            Self::DelayStore(d) => write!(f, "delay-store={}", time(d)),
            Self::DelayLoad(d) => write!(f, "delay-load={}", time(d)),
        }
    }
}

impl fmt::Display for Rules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, rule) in self.0.iter().enumerate() {
            write!(f, "{}{rule}", if i == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

/// The device that injects; see the module's description.
pub struct Inject {
    name: String,
    rules: Rules,
    inner: Box<dyn Device>,
    stores: &'static AtomicU64,
    loads: &'static AtomicU64,
}

/// What the rules say about one store.
enum Fate {
    Normal,
    Corrupt,
    Fail(DeviceError),
}

impl Inject {
    /// Bytes of shared memory for the counters, before the inner device's.
    pub const SHARED_LEN: usize = 64;

    /// `inner` with faults; `own` is [`Self::SHARED_LEN`] bytes of shared memory.
    pub fn new(name: String, rules: Rules, own: SharedArea, inner: Box<dyn Device>) -> Self {
        let counters = own.atomics64();
        Self { name, rules, inner, stores: &counters[0], loads: &counters[1] }
    }

    fn delay(&self, of: impl Fn(&Rule) -> Option<Duration>) {
        let total = self.rules.0.iter().filter_map(of).fold(Duration::ZERO, Duration::saturating_add);
        if !total.is_zero() {
            std::thread::sleep(total);
        }
    }

    fn store_fate(&self) -> Fate {
        // Relaxed: only the number matters.
        let n = self.stores.fetch_add(1, Relaxed) + 1;
        for rule in &self.rules.0 {
            match *rule {
                Rule::FailStore(when) if when.hits(n) => return Fate::Fail(DeviceError::Io(libc::EIO)),
                Rule::Full(when) if when.hits(n) => return Fate::Fail(DeviceError::Full),
                Rule::FullAfter(most) if n > most => return Fate::Fail(DeviceError::Full),
                Rule::CorruptStore(when) if when.hits(n) => return Fate::Corrupt,
                _ => {}
            }
        }
        Fate::Normal
    }

    fn load_fate(&self) -> Fate {
        let n = self.loads.fetch_add(1, Relaxed) + 1;
        for rule in &self.rules.0 {
            match *rule {
                Rule::FailLoad(when) if when.hits(n) => return Fate::Fail(DeviceError::Io(libc::EIO)),
                Rule::CorruptLoad(when) if when.hits(n) => return Fate::Corrupt,
                _ => {}
            }
        }
        Fate::Normal
    }
}

fn corrupt(page: &mut Page) {
    page.0[1234] ^= 0x40;
}

impl Device for Inject {
    fn name(&self) -> &str {
        &self.name
    }

    fn frames(&self) -> u32 {
        self.inner.frames()
    }

    fn store(&self, ops: &mut [StoreOp<'_>], owner: Owner) {
        self.delay(|rule| match rule {
            Rule::Delay(d) | Rule::DelayStore(d) => Some(*d),
            _ => None,
        });
        // One by one: a failed page must not reach the inner device, and its neighbours must.
        for op in ops {
            match self.store_fate() {
                Fate::Normal => self.inner.store(std::slice::from_mut(op), owner),
                Fate::Fail(error) => op.result = Err(error),
                Fate::Corrupt => {
                    let mut page = op.page.clone();
                    corrupt(&mut page);
                    let mut ops = [StoreOp { pfn: op.pfn, page: &page, sum: op.sum, result: Ok(()) }];
                    self.inner.store(&mut ops, owner);
                    op.result = ops[0].result.clone();
                }
            }
        }
    }

    fn load(&self, ops: &mut [LoadOp<'_>]) {
        self.delay(|rule| match rule {
            Rule::Delay(d) | Rule::DelayLoad(d) => Some(*d),
            _ => None,
        });
        self.inner.load(ops);
        for op in ops {
            match self.load_fate() {
                Fate::Normal => {}
                Fate::Fail(error) => op.result = Err(error),
                Fate::Corrupt => corrupt(op.page),
            }
        }
    }

    fn sum(&self, pfn: Pfn) -> Sum {
        self.inner.sum(pfn)
    }

    fn free(&self, pfns: &[Pfn], owner: Owner) {
        self.inner.free(pfns, owner);
    }

    fn repair(&self, owner: Owner) {
        self.inner.repair(owner);
    }

    fn remove(&self, owner: Owner) -> Result<(), rustix::io::Errno> {
        self.inner.remove(owner)
    }

    fn soon(&self, pfns: &mut dyn Iterator<Item = Pfn>) {
        self.inner.soon(pfns);
    }

    fn usage(&self) -> Usage {
        self.inner.usage()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::testing::{self, load, page, store};

    fn hits(when: &str) -> Vec<u64> {
        (1..10).filter(|n| parse_when(when).unwrap().hits(*n)).collect()
    }

    #[test]
    fn when() {
        assert_eq!(hits("5"), [5]);
        assert_eq!(hits("7x3"), [7, 8, 9]);
        assert_eq!(hits("8+"), [8, 9]);
        assert_eq!(hits("*").len(), 9);
        assert_eq!(hits("%4"), [4, 8]);
        for bad in ["", "0", "x", "1x", "1x0", "%0", "%", "+", "+1", "-1", "1++", "99999999999999999999"] {
            assert_eq!(parse_when(bad), None, "{bad}");
        }
    }

    #[test]
    fn each_rule_does_what_it_says() {
        let io = Err(DeviceError::Io(libc::EIO));
        let dev =
            testing::device("inject:fail-store=2,full=3,corrupt-store=4,fail-load=3,corrupt-load=5+:ram:1M");
        let stored: Vec<_> = (0..6).map(|n| store(&*dev, n, &page(n))).collect();
        assert_eq!(stored, [Ok(()), io.clone(), Err(DeviceError::Full), Ok(()), Ok(()), Ok(())]);
        // Loads 1 to 6; the page of frame 3 was stored corrupt.
        let loaded: Vec<_> = [0, 3, 4, 4, 4, 5].map(|n| load(&*dev, n).map(|p| p.0 == page(n).0)).into();
        let eio = Err(DeviceError::Io(libc::EIO));
        assert_eq!(loaded, [Ok(true), Ok(false), eio, Ok(true), Ok(false), Ok(false)]);
        assert_eq!(dev.sum(3), Sum::of(&page(3)), "the checksum is the true page's");
    }

    #[test]
    fn full_after() {
        let dev = testing::device("inject:full-after=2:ram:1M");
        let stored: Vec<_> = (0..4).map(|n| store(&*dev, n, &page(n)).is_ok()).collect();
        assert_eq!(stored, [true, true, false, false]);
    }

    #[test]
    fn delay() {
        let dev = testing::device("inject:delay-load=20ms:ram:1M");
        let start = std::time::Instant::now();
        store(&*dev, 0, &page(0)).unwrap();
        load(&*dev, 0).unwrap();
        assert!(start.elapsed() >= Duration::from_millis(20));
    }
}
