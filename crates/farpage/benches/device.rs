//! What the devices cost, in microseconds a page: `cargo bench --bench device [-- SPEC...]`.
//!
//! First the two LZ4 codecs that were compared for the `ram` device, then each device (default `ram:256M` and a
//! file in the temporary directory): the best of several rounds over 4096 pages.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use farpage::device::spec::{Spec, backing_path};
use farpage::device::{Attach, Device, LoadOp, StoreOp, Sum};
use farpage::sys::{Peers, SharedArea, lz4};
use farpage::{PAGE_SIZE, Page};

const PAGES: usize = 4096;
const ROUNDS: usize = 5;

struct Everyone;
impl Peers for Everyone {
    fn is_alive(&self, _: u16) -> bool {
        true
    }
}

fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// Kinds of data: name and maker of a page.
type Kind = (&'static str, fn(&mut u64) -> Page);

const KINDS: [Kind; 5] = [
    ("half: 2 KiB random, then one word", |state| {
        let word = random(state) as u8;
        page(|i, _| if i < 2048 { random(state) as u8 } else { word })
    }),
    ("4:1, 1 KiB random four times", |state| {
        page(|i, page| if i < 1024 { random(state) as u8 } else { page[i - 1024] })
    }),
    ("words", |state| {
        let words = "the memory page of a frame and kernel device count is free when it process shared lock";
        let words: Vec<_> = words.split(' ').collect();
        let mut text = String::new();
        while text.len() < PAGE_SIZE {
            text = text + words[random(state) as usize % words.len()] + " ";
        }
        page(|i, _| text.as_bytes()[i])
    }),
    ("small integers", |state| {
        let mut word = 0;
        page(|i, _| {
            if i % 4 == 0 {
                word = random(state) as u32 % 5000;
            }
            word.to_le_bytes()[i % 4]
        })
    }),
    ("random", |state| page(|_, _| random(state) as u8)),
];

fn page(mut byte: impl FnMut(usize, &[u8; PAGE_SIZE]) -> u8) -> Page {
    let mut page = Page([0; PAGE_SIZE]);
    for i in 0..PAGE_SIZE {
        page.0[i] = byte(i, &page.0);
    }
    page
}

/// Microseconds a page of the fastest round.
fn best(pages: usize, mut round: impl FnMut()) -> f64 {
    let once = |round: &mut dyn FnMut()| {
        let start = Instant::now();
        round();
        start.elapsed().as_secs_f64() * 1e6 / pages as f64
    };
    (0..ROUNDS).map(|_| once(&mut round)).fold(f64::MAX, f64::min)
}

fn codecs(kind: &Kind, pages: &[Page]) {
    let mut state = Box::new(lz4::State([0; lz4::STATE_LEN]));
    let mut table = lz4_flex::block::CompressTable::default();
    let mut out = vec![0; 2 * PAGE_SIZE];
    let mut back = vec![0; PAGE_SIZE];
    let c =
        |state: &mut lz4::State, page: &Page, out: &mut [u8]| lz4::compress(state, &page.0, out).unwrap_or(0);
    let packed: Vec<Vec<u8>> = pages
        .iter()
        .map(|page| {
            let len = c(&mut state, page, &mut out);
            out[..len].to_vec()
        })
        .collect();
    let total: usize = packed.iter().map(Vec::len).sum();
    let each = |f: &mut dyn FnMut(usize)| best(pages.len(), || (0..pages.len()).for_each(&mut *f));
    println!(
        "{:36} {:5.2}  C {:5.2} {:5.2}   lz4_flex {:5.2} {:5.2}",
        kind.0,
        total as f64 / (pages.len() * PAGE_SIZE) as f64,
        each(&mut |i| _ = black_box(c(&mut state, &pages[i], &mut out))),
        each(&mut |i| _ = black_box(lz4::decompress(&packed[i], &mut back))),
        each(&mut |i| {
            _ = black_box(lz4_flex::block::compress_into_with_table(&pages[i].0, &mut out, &mut table))
        }),
        each(&mut |i| _ = black_box(lz4_flex::block::decompress_into(&packed[i], &mut back))),
    );
}

fn devices(dev: &dyn Device, kind: &Kind, pages: &[Page]) {
    let sums: Vec<Sum> = pages.iter().map(Sum::of).collect();
    let all: Vec<u32> = (0..pages.len() as u32).collect();
    let store = || {
        for (n, some) in pages.chunks(64).enumerate() {
            let mut ops: Vec<_> = some
                .iter()
                .enumerate()
                .map(|(i, page)| {
                    let pfn = n * 64 + i;
                    StoreOp { pfn: pfn as u32, page, sum: sums[pfn], result: Ok(()) }
                })
                .collect();
            dev.store(&mut ops, 1);
            assert!(ops.iter().all(|op| op.result.is_ok()), "{}", dev.name());
        }
    };
    let free = || all.chunks(64).for_each(|some| dev.free(some, 1));
    let first = Instant::now();
    store();
    let first = first.elapsed().as_secs_f64() * 1e6 / pages.len() as f64;
    let usage = dev.usage();
    let mut frees = f64::MAX;
    let again = best(pages.len(), || {
        frees = frees.min({
            let start = Instant::now();
            free();
            start.elapsed().as_secs_f64() * 1e6 / pages.len() as f64
        });
        store();
    }) - frees;
    let mut state = 77;
    let order: Vec<u32> = pages.iter().map(|_| random(&mut state) as u32 % pages.len() as u32).collect();
    let mut one = Page([0; PAGE_SIZE]);
    let single = best(pages.len(), || {
        for pfn in &order {
            let mut ops = [LoadOp { pfn: *pfn, page: &mut one, result: Ok(Sum::default()) }];
            dev.load(&mut ops);
            assert_eq!(ops[0].result, Ok(sums[*pfn as usize]));
        }
    });
    let mut many = vec![Page([0; PAGE_SIZE]); 64];
    let batch = best(pages.len(), || {
        for pfns in all.chunks(64) {
            let mut ops: Vec<_> = pfns
                .iter()
                .zip(&mut many)
                .map(|(pfn, page)| LoadOp { pfn: *pfn, page, result: Ok(Sum::default()) })
                .collect();
            dev.load(&mut ops);
        }
    });
    free();
    println!(
        "{:36} {first:6.2} {again:6.2} {frees:6.2} {single:6.2} {batch:6.2}   {:4.1}%",
        kind.0,
        (usage.used as f64 / usage.payload as f64 - 1.0) * 100.0
    );
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut state = 88_172_645_463_325_252;
    let sets: Vec<(Kind, Vec<Page>)> =
        KINDS.iter().map(|kind| (*kind, (0..PAGES).map(|_| kind.1(&mut state)).collect())).collect();
    println!("{:36} {:>5}    {:>5} {:>5}", "LZ4, us a page", "size", "comp", "dec");
    sets.iter().for_each(|(kind, pages)| codecs(kind, &pages[..512]));
    let mut specs: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with("--")).collect();
    if specs.is_empty() {
        specs = vec!["ram:256M".into(), format!("file:{}:64M", std::env::temp_dir().display())];
    }
    for spec in specs {
        let spec: Spec = spec.parse()?;
        let backing = spec.create_backing()?;
        let dev = spec.attach(Attach {
            area: SharedArea::anonymous(spec.shared_len())?,
            path: backing.as_ref().map(backing_path),
            peers: Arc::new(Everyone),
            create: true,
        })?;
        println!(
            "\n{:36} {:>6} {:>6} {:>6} {:>6} {:>6}   waste",
            format!("{}, us a page", dev.name()),
            "store1",
            "store",
            "free",
            "load",
            "batch"
        );
        sets.iter().for_each(|(kind, pages)| devices(&*dev, kind, pages));
    }
    Ok(())
}
