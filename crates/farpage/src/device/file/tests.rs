//! Tests of the file device: contents, batches, ENOSPC, closed descriptors, fork, RLIMIT_FSIZE.

use std::os::fd::AsRawFd;

use super::*;
use crate::device::spec::{Spec, backing_path};
use crate::device::testing::{self, ME, in_child, load, load_all, page, status, store, store_all};

fn file_in(dir: &Path, size: &str) -> File {
    let spec: Spec = format!("file:{}:{size}", dir.display()).parse().unwrap();
    let (attach, _) = testing::attach(&spec);
    File::attach(spec.to_string(), spec.size().unwrap(), &attach).unwrap()
}

fn check_pages(dev: &dyn Device, pages: &[(Pfn, Page)]) {
    let pfns: Vec<_> = pages.iter().map(|(pfn, _)| *pfn).collect();
    for ((pfn, page), loaded) in pages.iter().zip(load_all(dev, &pfns)) {
        let (bytes, sum) = loaded.unwrap();
        assert!(bytes.0 == page.0, "frame {pfn}");
        assert_eq!(sum, Sum::of(page));
    }
}

/// Runs of several lengths, single frames, falling order, more than one batch.
fn scattered() -> Vec<(Pfn, Page)> {
    let pfns = (0..70).chain([200, 202, 204, 205, 206, 100, 99, 98]).chain(120..125).chain([255]);
    pfns.map(|n| (n, page(n))).collect()
}

#[test]
fn batches_come_back_with_and_without_a_ring() {
    let dir = tempfile::tempdir().unwrap();
    let dev = file_in(dir.path(), "1M");
    for ring in [true, false] {
        dev.ring_allowed.store(ring, Relaxed);
        let pages = scattered();
        assert!(store_all(&dev, &pages).iter().all(Result::is_ok));
        check_pages(&dev, &pages);
        if ring && !dev.ring_allowed.load(Relaxed) {
            eprintln!("SKIPPED: io_uring is not available");
        }
        assert_eq!(dev.usage().payload, pages.len() as u64 * 4096);
        let pfns: Vec<_> = pages.iter().map(|(pfn, _)| *pfn).collect();
        dev.free(&pfns, ME);
        dev.free(&pfns, ME);
        assert_eq!((dev.usage().used, dev.usage().peak), (0, pages.len() as u64 * 4096));
        assert_eq!(dev.sum(5), Sum::default());
    }
    assert!(std::fs::read_dir(dir.path()).unwrap().next().is_none(), "the file has no name");
    assert_eq!(store(&dev, 256, &page(1)), Err(DeviceError::Io(libc::EINVAL)));
    assert_eq!(load(&dev, 256).err(), Some(DeviceError::Io(libc::EINVAL)));
}

#[test]
fn the_backing_file_is_private_sparse_and_of_full_length() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    let dir = tempfile::tempdir().unwrap();
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    for backing in [
        create_backing(dir.path(), 64 << 20).unwrap(),
        named_then_unlinked(dir.path(), flags, Mode::RUSR | Mode::WUSR)
            .inspect(|file| rustix::fs::ftruncate(file, 64 << 20).unwrap())
            .unwrap(),
    ] {
        let meta = std::fs::metadata(backing_path(&backing)).unwrap();
        assert_eq!((meta.len(), meta.nlink(), meta.permissions().mode() & 0o777), (64 << 20, 0, 0o600));
        assert!(meta.blocks() < 100);
    }
    assert!(std::fs::read_dir(dir.path()).unwrap().next().is_none());
}

/// A tmpfs of 128 KiB with a device of 1 MiB on it.
#[test]
fn a_full_disk_refuses_pages_and_loses_none() {
    let dir = tempfile::tempdir().unwrap();
    let path = std::ffi::CString::new(dir.path().to_str().unwrap()).unwrap();
    let (tmpfs, options) = (c"tmpfs", c"size=128k");
    // SAFETY: all strings are terminated.
    let mounted =
        unsafe { libc::mount(tmpfs.as_ptr(), path.as_ptr(), tmpfs.as_ptr(), 0, options.as_ptr().cast()) };
    if mounted != 0 {
        eprintln!("SKIPPED: cannot mount a small tmpfs: {}", std::io::Error::last_os_error());
        return;
    }
    let result = std::panic::catch_unwind(|| {
        let dev = file_in(dir.path(), "1M");
        for ring in [true, false] {
            dev.ring_allowed.store(ring, Relaxed);
            // Runs of 10 frames, so that some run is cut short in its middle.
            let pages: Vec<_> = (0..60).map(|n| (n + n / 10, page(n))).collect();
            let results = store_all(&dev, &pages);
            let stored: Vec<_> = pages.iter().zip(&results).filter(|(_, r)| r.is_ok()).collect();
            assert!((20..=32).contains(&stored.len()), "{}", stored.len());
            assert!(results.iter().all(|r| matches!(r, Ok(()) | Err(DeviceError::Full))), "{results:?}");
            check_pages(&dev, &stored.iter().map(|(page, _)| (*page).clone()).collect::<Vec<_>>());
            assert_eq!(dev.usage().payload, stored.len() as u64 * 4096);
        }
    });
    // SAFETY: as above.
    unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
    result.unwrap();
}

#[test]
fn closed_descriptors_are_opened_again() {
    let dir = tempfile::tempdir().unwrap();
    let dev = file_in(dir.path(), "1M");
    let pages = scattered();
    assert!(store_all(&dev, &pages).iter().all(Result::is_ok));
    let fd = dev.file.get().unwrap().as_raw_fd();
    // SAFETY: what a program does that closes all descriptors.
    unsafe { libc::close(fd) };
    check_pages(&dev, &pages);
    // SAFETY: as above.
    unsafe { libc::close(dev.file.get().unwrap().as_raw_fd()) };
    assert!(store_all(&dev, &pages).iter().all(Result::is_ok));
    assert!(load(&dev, 255).unwrap().0 == page(255).0);
}

#[test]
fn a_forked_child_makes_its_own_ring() {
    let dir = tempfile::tempdir().unwrap();
    let dev = file_in(dir.path(), "1M");
    let pages = scattered();
    assert!(store_all(&dev, &pages).iter().all(Result::is_ok));
    let other: Vec<_> = [201, 210, 220].map(|n| (n, page(n))).into();
    let child = in_child(|| {
        check_pages(&dev, &pages);
        assert!(store_all(&dev, &other).iter().all(Result::is_ok));
    });
    check_pages(&dev, &pages);
    assert_eq!(status(child), 0);
    check_pages(&dev, &other);
}

/// The manager's threads each have a descriptor table of their own, in which the same number is another ring.
#[test]
fn threads_with_their_own_descriptors_use_their_own_rings() {
    let dir = tempfile::tempdir().unwrap();
    let dev = file_in(dir.path(), "1M");
    let pages = scattered();
    assert!(store_all(&dev, &pages).iter().all(Result::is_ok));
    let together = std::sync::Barrier::new(3);
    std::thread::scope(|s| {
        for _ in 0..3 {
            s.spawn(|| {
                crate::sys::keep_only(&[]);
                for _ in 0..20 {
                    // All at once, so that each takes another's turn at the rings.
                    together.wait();
                    check_pages(&dev, &pages);
                }
            });
        }
    });
}

/// With RLIMIT_FSIZE, writing beyond it sends SIGXFSZ, inside the file as well. In a child: limits are a process's.
#[test]
fn a_limit_on_file_size_is_full_and_not_a_signal() {
    let dir = tempfile::tempdir().unwrap();
    let dev = file_in(dir.path(), "1M");
    let pages: Vec<_> = (0..64).map(|n| (n, page(n))).collect();
    let child = in_child(|| {
        let limit = libc::rlimit { rlim_cur: 40 * 4096 + 100, rlim_max: libc::RLIM_INFINITY };
        // SAFETY: the limit is a valid structure.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &limit) }, 0);
        for (n, result) in store_all(&dev, &pages).into_iter().enumerate() {
            assert_eq!(result, if n < 40 { Ok(()) } else { Err(DeviceError::Full) });
        }
        // And creating a device larger than the limit is an error, not a signal.
        assert_eq!(create_backing(dir.path(), 1 << 20).err(), Some(Errno::FBIG));
    });
    assert_eq!(status(child), 0);
    check_pages(&dev, &pages[..40]);
}
