//! Models of whole scenarios under shuttle: the real code on the real kernel, with shuttle deciding who goes on at each
//! frame operation, granule lock, page movement and wait ([`crate::sys::point`]). The program's threads are tasks that look
//! whether a page is there before they touch it, and ask for it as a handler would if it is not; so nothing ever
//! waits in the kernel, and every interleaving of the steps is one that can happen.
//!
//! `RUSTFLAGS='--cfg shuttle' CARGO_TARGET_DIR=target/shuttle cargo test --release -p farpage --lib models`
//!
//! Mutations tried by hand, and the model that catches each:
//!
//! | mutation | caught by |
//! |---|---|
//! | settling does not look whether a page was taken back while it was stored | `what_is_written_…` and three more, by SIGBUS |
//! | what was stored for nothing is not put | `what_is_written_…` and three more |
//! | settling forgets to put the old copy | `two_that_evict_…`, `forks_…` |
//! | … where the page became same-filled | `what_is_written_…`, `forks_…`, `what_is_held_stays` |
//! | a page with a copy is believed clean | `two_that_evict_…`, `forks_…` |
//! | what is taken back stays marked as staged | all that move pages |
//! | `take_back` without the granule's lock | all that move pages, by SIGBUS |
//! | `bring_in` without the granules' locks | `what_is_written_…`, `drops_…` |
//! | a staged page is brought in from its old copy | `what_is_written_…` and three more |
//! | fork forgets the child's reference | `forks_…`, `drops_…` |
//! | fork leaves its mark | none: the reaper settles it |
//! | a discard keeps what is staged | `drops_…` |
//! | a discard keeps the entries; or clears them without a put | all that move pages |
//! | `drop_copies` without the lock; or of pages that are away | `two_that_evict_…` |
//! | evicting without the granules' locks | `what_is_written_…` and three more |
//! | evicting does not say that it moves; holding does not wait for it; evicting does not look at holds | `what_is_held_stays` |
//! | evicting ignores pins | `what_is_pinned_stays` |
//! | a pin does not wait for moves, or waits before it counts | `what_is_pinned_stays`, `a_page_stays_until_…` |
//! | migrating ignores pins; the first unpin ends all | `what_is_pinned_stays`, `a_page_stays_until_…` |
//! | the reaper forgets the puts | `forks_…`, `drops_…` |
//! | `Mail::send` does not look again, or takes back what is there no more | `mail_is_served_once` |
//! | `Mail::sleep` looks before it says so; `take` is a load and a store | `mail_is_served_once` |
#![allow(unsafe_code, reason = "the program's accesses to its memory")]

use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use shuttle::thread;

use crate::PAGE_SIZE;
use crate::domain::{Config, Domain, Launcher};
use crate::fault::mail::Mail;
use crate::migrate::{MigrateReport, Refusal, Target};
use crate::reclaim::Hands;
use crate::space::Space;
use crate::space::pin::Pin;
use crate::space::range::GRANULE;
use crate::sys::{PageScan, point};

/// Pages that a model works on, in the middle of a granule.
const PAGES: usize = 3;
/// Schedules that each model tries.
const SCHEDULES: usize = 1500;

/// What all models share. One for the process: every model leaves it as it found it.
struct Ground {
    launcher: Launcher,
    space: &'static Space,
    scan: PageScan,
    /// Two granules of address space, aligned.
    base: usize,
}

fn ground() -> &'static Ground {
    static GROUND: OnceLock<Ground> = OnceLock::new();
    GROUND.get_or_init(|| {
        let config = Config {
            dram: 8 << 20,
            max_pinned: None,
            min_size: 1 << 20,
            strict: false,
            verbose: false,
            recycle: true,
            devices: vec!["ram:16M".parse().unwrap()],
        };
        let launcher = Launcher::create(&config).unwrap();
        let domain = Domain::attach(&launcher.env_value()).unwrap();
        let space: &'static Space = Box::leak(Box::new(Space::new(domain).unwrap()));
        space.set_running(|_| false);
        // Nobody reads messages, so nobody may wait for one to be read.
        space.faults.set_bell(0);
        let len = 3 * GRANULE;
        let raw = crate::sys::reserve(None, len).unwrap();
        let base = raw.next_multiple_of(GRANULE);
        let prot = rustix::mm::MprotectFlags::READ | rustix::mm::MprotectFlags::WRITE;
        // SAFETY: our own reservation, of which nothing is used yet.
        unsafe { rustix::mm::mprotect(raw as *mut _, len, prot).unwrap() };
        Ground { launcher, space, scan: PageScan::open().unwrap(), base }
    })
}

/// The program's memory, and what must be in it.
struct Program {
    ground: &'static Ground,
    start: usize,
    /// What each page holds: 0 after a drop or before the first write. Changes with the page, in one step.
    holds: [AtomicU64; PAGES],
    tids: AtomicU32,
}

/// The words of a page with this stamp: one value repeated if the stamp is a multiple of 3.
fn word(stamp: u64, i: usize) -> u64 {
    if stamp.is_multiple_of(3) {
        stamp << 32 | stamp
    } else {
        stamp.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ i as u64
    }
}

impl Program {
    /// Fresh managed memory.
    fn new() -> Arc<Self> {
        let ground = ground();
        let start = ground.base + 7 * PAGE_SIZE;
        let space = ground.space;
        // Registered from the start, as under pressure.
        space.pressure.store(true, Ordering::Relaxed);
        space.change(|world| space.add(world, start, start + PAGES * PAGE_SIZE)).unwrap();
        let holds = [const { AtomicU64::new(0) }; PAGES];
        Arc::new(Self { ground, start, holds, tids: AtomicU32::new(1 << 20) })
    }

    fn addr(&self, page: usize) -> usize {
        self.start + page * PAGE_SIZE
    }

    fn is_there(&self, page: usize) -> bool {
        self.ground.scan.count(self.addr(page), self.addr(page) + PAGE_SIZE) == Ok(1)
    }

    /// Runs `f` on a page that is there; no other task goes on inside `f`.
    fn touch(&self, page: usize, hands: &mut Hands, f: impl FnOnce(&mut [u64; PAGE_SIZE / 8])) {
        let tid = self.tids.fetch_add(1, Ordering::Relaxed);
        while !self.is_there(page) {
            // A thread that waits for the page, and a handler that has read that.
            self.ground.space.fault(self.addr(page), tid, hands);
            while self.ground.space.faults.next_fault().is_some() {}
            // Not a point: whoever waits lets the others go on, whatever the schedule.
            thread::yield_now();
        }
        // SAFETY: mapped as long as the program lives, there, and all tasks are of one thread.
        f(unsafe { &mut *(self.addr(page) as *mut [u64; PAGE_SIZE / 8]) });
    }

    fn read(&self, page: usize, hands: &mut Hands) {
        self.touch(page, hands, |words| {
            let stamp = self.holds[page].load(Ordering::Relaxed);
            for (i, w) in words.iter().enumerate() {
                assert_eq!(*w, word(stamp, i), "page {page}, word {i}: not what stamp {stamp} says");
            }
        });
    }

    fn write(&self, page: usize, stamp: u64, hands: &mut Hands) {
        self.touch(page, hands, |words| {
            self.holds[page].store(stamp, Ordering::Relaxed);
            words.iter_mut().enumerate().for_each(|(i, w)| *w = word(stamp, i));
        });
    }

    /// Out of DRAM, all the way: staged, and then settled in steps between which anything may happen.
    fn push_out(&self, hands: &mut Hands) {
        let space = self.ground.space;
        {
            let world = space.world.read();
            if let Some(found) = world.ranges.granule(self.start) {
                space.push_out(&world, &found, false, hands);
            }
        }
        for _ in 0..4 {
            point::point();
            if space.settle_next(&space.world.read(), hands).is_none() {
                break;
            }
        }
    }

    /// `MADV_DONTNEED`.
    fn discard(&self, page: usize) {
        let space = self.ground.space;
        let (start, end) = (self.addr(page), self.addr(page) + PAGE_SIZE);
        space
            .change(|world| {
                space.discard(world, start, end, || {
                    crate::sys::drop_pages(start, end - start);
                    self.holds[page].store(0, Ordering::Relaxed);
                    Ok(())
                })
            })
            .unwrap();
    }

    /// A fork whose child ends at once, and is reaped.
    fn fork(&self) {
        let space = self.ground.space;
        let forking = space.before_fork().unwrap();
        point::point();
        space.after_fork_in_parent(forking);
        point::point();
        self.ground.launcher.reap();
    }

    /// After all tasks: every page is what it must be, every count right; then it is unmapped, and nothing is left.
    fn finish(&self) {
        let mut hands = Hands::new();
        (0..PAGES).for_each(|p| self.read(p, &mut hands));
        self.push_out(&mut hands);
        (0..PAGES).for_each(|p| self.read(p, &mut hands));
        let space = self.ground.space;
        self.ground.launcher.reap();
        let audit = space.domain.audit_frames().unwrap();
        assert!(audit.is_right() && audit.moving == 0, "{audit:?}");
        let charged = || {
            let world = space.world.write();
            (space.slot().charge.load(Ordering::SeqCst), space.counted(&world))
        };
        let (charge, there) = charged();
        assert_eq!(charge, there, "pages charged, pages there");
        let (start, end) = (self.start, self.start + PAGES * PAGE_SIZE);
        let unmap = || {
            crate::sys::drop_pages(start, end - start);
            Ok(())
        };
        space.change(|world| space.unmap(world, start, end, unmap)).unwrap();
        assert_eq!(space.domain.stats().leaked_frames, 0, "frames in use after the unmap");
        let (charge, there) = charged();
        assert_eq!(charge, there, "pages charged, pages there, after the unmap");
    }
}

/// Tries many schedules of `tasks` on a fresh program.
fn model(tasks: impl Fn(&Arc<Program>) -> Vec<thread::JoinHandle<()>> + Send + Sync + 'static) {
    let f = move || {
        point::modelled(|| {
            let program = Program::new();
            let mut hands = Hands::new();
            (0..PAGES).for_each(|p| program.write(p, 1 + p as u64, &mut hands));
            tasks(&program).into_iter().for_each(|t| t.join().unwrap());
            program.finish();
        });
    };
    // One model at a time: they share the ground.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut config = shuttle::Config::new();
    config.stack_size = 1 << 20;
    config.max_steps = shuttle::MaxSteps::FailAfter(1_000_000);
    let f = Arc::new(f);
    let again = f.clone();
    let random = shuttle::scheduler::RandomScheduler::new(SCHEDULES);
    shuttle::Runner::new(random, config.clone()).run(move || f());
    let pct = shuttle::scheduler::PctScheduler::new(3, SCHEDULES);
    shuttle::Runner::new(pct, config).run(move || again());
}

/// A task of the program, with the buffers of the handler that serves it.
fn task(p: &Arc<Program>, f: impl FnOnce(&Program, &mut Hands) + Send + 'static) -> thread::JoinHandle<()> {
    let p = p.clone();
    thread::spawn(move || f(&p, &mut Hands::new()))
}

#[test]
fn what_is_written_while_it_leaves_is_kept() {
    model(|p| {
        vec![
            task(p, |p, hands| (0..3).for_each(|_| p.push_out(hands))),
            task(p, |p, hands| (0..3).for_each(|n| p.write(0, 10 + n, hands))),
            task(p, |p, hands| (0..4).for_each(|n| p.read(n % PAGES, hands))),
        ]
    });
}

#[test]
fn two_that_evict_and_one_that_gives_up_copies() {
    model(|p| {
        vec![
            task(p, |p, hands| (0..2).for_each(|_| p.push_out(hands))),
            task(p, |p, hands| {
                p.push_out(hands);
                p.write(1, 20, hands);
            }),
            task(p, |p, hands| {
                for n in 0..3 {
                    p.read(n % PAGES, hands);
                    let space = p.ground.space;
                    space.drop_copies(&space.world.read(), 2);
                }
            }),
        ]
    });
}

#[test]
fn forks_while_pages_move() {
    model(|p| {
        vec![
            task(p, |p, hands| (0..3).for_each(|_| p.push_out(hands))),
            task(p, |p, hands| (0..3).for_each(|n| p.write(n % 2, 30 + n as u64, hands))),
            task(p, |p, _| (0..2).for_each(|_| p.fork())),
        ]
    });
}

#[test]
fn drops_while_pages_move() {
    model(|p| {
        vec![
            task(p, |p, hands| (0..3).for_each(|_| p.push_out(hands))),
            task(p, |p, hands| {
                p.discard(0);
                p.write(0, 40, hands);
                p.discard(1);
                p.read(1, hands);
            }),
            task(p, |p, hands| {
                p.read(2, hands);
                p.fork();
            }),
        ]
    });
}

/// A system call that writes by plain references writes to pages that stay.
#[test]
fn what_is_held_stays() {
    model(|p| {
        vec![
            task(p, |p, hands| (0..3).for_each(|_| p.push_out(hands))),
            task(p, |p, hands| {
                let space = p.ground.space;
                for n in 0..2 {
                    let hold = space.hold(p.addr(0), p.addr(1));
                    // What the kernel does first, and may fault at; from then on it has the page.
                    p.read(0, hands);
                    for i in 0..4 {
                        point::point();
                        assert!(p.is_there(0), "a held page has left");
                        let stamp = 50 + 10 * n + i;
                        p.write(0, stamp, hands);
                    }
                    drop(hold);
                }
            }),
            task(p, |p, hands| (0..3).for_each(|n| p.read(n, hands))),
        ]
    });
}

/// Tasks that ask the worker for something, and the worker: a task of its own, which ends when they all have.
fn with_worker(p: &Arc<Program>, clients: Vec<Client>) -> Vec<thread::JoinHandle<()>> {
    let left = Arc::new(AtomicUsize::new(clients.len()));
    let theirs = left.clone();
    let worker = task(p, move |p, hands| {
        let space = p.ground.space;
        while theirs.load(Ordering::SeqCst) != 0 {
            if !space.next_job(&space.world.read(), hands) {
                thread::yield_now();
            }
        }
    });
    let client = |f: Client| {
        let left = left.clone();
        task(p, move |p, hands| {
            f(p, hands);
            left.fetch_sub(1, Ordering::SeqCst);
        })
    };
    [worker].into_iter().chain(clients.into_iter().map(client)).collect()
}

type Client = Box<dyn FnOnce(&Program, &mut Hands) + Send>;

impl Program {
    fn migrate(&self, to: Target) -> MigrateReport {
        self.ground.space.migrate(self.addr(0)..self.addr(PAGES), to).unwrap()
    }
}

/// A page that is pinned is there, and where it was, whoever evicts or migrates.
#[test]
fn what_is_pinned_stays() {
    model(|p| {
        let pins = |p: &Program, hands: &mut Hands| {
            let space = p.ground.space;
            for n in 0..2 {
                let pin = space.pin(p.addr(0)..p.addr(2), Pin::Short, n == 1).unwrap();
                for i in 0..3 {
                    point::point();
                    assert!(p.is_there(0) && p.is_there(1), "a pinned page has left");
                    p.write(n, 60 + 10 * n as u64 + i, hands);
                }
                drop(pin);
            }
            assert_eq!(space.pinned(), 0);
        };
        let evicts = |p: &Program, hands: &mut Hands| (0..2).for_each(|_| p.push_out(hands));
        let migrates = |p: &Program, _: &mut Hands| {
            let report = p.migrate(Target::Device(0));
            let why = |(_, why): (usize, Refusal)| matches!(why, Refusal::Pinned | Refusal::Busy);
            assert!(report.refused().all(why), "{report:?}");
            p.migrate(Target::System);
            p.migrate(Target::Device(0));
        };
        with_worker(p, vec![Box::new(pins), Box::new(evicts), Box::new(migrates)])
    });
}

/// Two pins of the same page, which end in any order, while it is evicted and migrated.
#[test]
fn a_page_stays_until_its_last_pin_ends() {
    model(|p| {
        let pins = |stamp: u64| {
            move |p: &Program, hands: &mut Hands| {
                let pin = p.ground.space.pin(p.addr(1)..p.addr(2), Pin::LongTerm, false).unwrap();
                for i in 0..3 {
                    point::point();
                    assert!(p.is_there(1), "a pinned page has left");
                    p.read(1, hands);
                    p.write(2, stamp + i, hands);
                }
                drop(pin);
            }
        };
        let moves = |p: &Program, hands: &mut Hands| {
            p.push_out(hands);
            p.migrate(Target::Device(0));
        };
        with_worker(p, vec![Box::new(pins(80)), Box::new(pins(90)), Box::new(moves)])
    });
}

/// Migrations to a device and back, in the middle of evictions, writes and forks.
#[test]
fn migrations_while_pages_move() {
    model(|p| {
        let migrates = |p: &Program, _: &mut Hands| {
            p.migrate(Target::Device(0));
            p.migrate(Target::System);
        };
        let writes = |p: &Program, hands: &mut Hands| {
            (0..3).for_each(|n| p.write(n % 2, 100 + n as u64, hands));
            p.fork();
        };
        let evicts = |p: &Program, hands: &mut Hands| (0..2).for_each(|_| p.push_out(hands));
        with_worker(p, vec![Box::new(migrates), Box::new(writes), Box::new(evicts)])
    });
}

/// Handlers that leave faults to each other, of which one goes to sleep and wakes: each fault is served once.
#[test]
fn mail_is_served_once() {
    const FAULTS: usize = 4;
    let f = || {
        point::modelled(|| {
            let mail = Arc::new(Mail::new());
            let served = Arc::new([const { AtomicUsize::new(0) }; FAULTS]);
            let serve = |served: &[AtomicUsize; FAULTS], fault: (usize, u32)| {
                served[fault.0 / PAGE_SIZE - 1].fetch_add(1, Ordering::SeqCst);
            };
            let (m, s) = (mail.clone(), served.clone());
            let sender = thread::spawn(move || {
                m.wake(0);
                for i in 1..=FAULTS {
                    if !m.send(1, i * PAGE_SIZE, 9) {
                        serve(&s, (i * PAGE_SIZE, 9));
                    }
                }
            });
            let (m, s) = (mail.clone(), served.clone());
            let owner = thread::spawn(move || {
                for _ in 0..2 {
                    m.wake(1);
                    if let Some(fault) = m.mine(1, true) {
                        serve(&s, fault);
                    }
                    if let Some(fault) = m.sleep(1) {
                        serve(&s, fault); // and awake again, for the next round
                    }
                }
                // Until he really sleeps, as a handler does.
                while let Some(fault) = m.sleep(1) {
                    serve(&s, fault);
                }
            });
            sender.join().unwrap();
            owner.join().unwrap();
            // Nobody looks any more: what is in a box now was left behind.
            let served: Vec<usize> = served.iter().map(|n| n.load(Ordering::SeqCst)).collect();
            assert_eq!(served, [1; FAULTS]);
        });
    };
    shuttle::check_random(f, 20 * SCHEDULES);
    shuttle::check_pct(f, 20 * SCHEDULES, 3);
}
