//! Requests byte for byte, whole and cut short; answers byte for byte.

use super::*;
use crate::fuse::answer::{Attr, Entry, Line, Opened, Position, Volume, Xattr};
use crate::fuse::rules::Statfs;
use fuser::{Errno, FileAttr, FileType, FopenFlags, INodeNo};

/// Numbers in the host's order, one after the other.
#[derive(Default)]
struct Bytes(Vec<u8>);

impl Bytes {
    fn u16(mut self, number: u16) -> Self {
        self.0.extend_from_slice(number.as_bytes());
        self
    }

    fn u32(mut self, number: u32) -> Self {
        self.0.extend_from_slice(number.as_bytes());
        self
    }

    fn u64(mut self, number: u64) -> Self {
        self.0.extend_from_slice(number.as_bytes());
        self
    }
}

fn head(opcode: u32) -> Head {
    let bytes = Bytes::default()
        .u32(40)
        .u32(opcode)
        .u64(77)
        .u64(5)
        .u32(1000)
        .u32(1001)
        .u32(1)
        .u32(0);
    let head = Head::parse(&bytes.0).unwrap();
    let expected = (opcode, 77, 5, 1000);
    assert_eq!((head.opcode, head.unique, head.nodeid, head.uid), expected);
    assert_eq!(Head::parse(&bytes.0[..39]), None);
    head
}

/// Takes a request apart, and all that is shorter: that is refused, and nothing panics.
fn decoded(opcode: u32, fixed: &[u8]) -> Verb<'static> {
    let head = head(opcode);
    assert_eq!(fixed_len(opcode), fixed.len(), "opcode {opcode}");
    for len in 0..fixed.len() {
        assert_eq!(decode(&head, &fixed[..len], b"n\0"), Err(TooShort), "{len}");
    }
    decode(&head, fixed, b"n\0").unwrap()
}

#[test]
fn reads_and_writes_are_taken_apart() {
    let fixed = Bytes::default()
        .u64(9)
        .u64(1 << 40)
        .u32(4096)
        .u32(0)
        .u64(3)
        .u32(0o100_002)
        .u32(0)
        .0;
    let (fh, offset, size) = (9, 1 << 40, 4096);
    assert_eq!(decoded(READ, &fixed), Verb::Read { fh, offset, size });
    assert_eq!(decoded(WRITE, &fixed), Verb::Write { fh, offset, size });
    assert_eq!(decoded(READDIR, &fixed), Verb::Readdir { offset, size });
    let mut header = vec![0; 128];
    header[4..8].copy_from_slice(WRITE.as_bytes());
    header.extend_from_slice(&fixed);
    assert_eq!(data_len(&header, 128), 4096);
    assert_eq!(data_len(&header[..140], 128), 0);
    header[4..8].copy_from_slice(FSYNC.as_bytes());
    assert_eq!(data_len(&header, 128), 0);
}

#[test]
fn numbers_are_found_where_they_are() {
    let open = |flags: u32| decoded(OPEN, &Bytes::default().u32(flags).u32(0).0);
    for (flags, for_writing) in [(0, false), (1, true), (2, true), (3, false), (0x8001, true)] {
        assert_eq!(open(flags), Verb::Open { for_writing });
    }
    let release = Bytes::default().u64(4).u32(2).u32(0).u64(0).0;
    let for_writing = true;
    let fh = 4;
    assert_eq!(
        decoded(RELEASE, &release),
        Verb::Release { fh, for_writing }
    );
    let fsync = Bytes::default().u64(6).u32(1).u32(0).0;
    assert_eq!(decoded(FSYNC, &fsync), Verb::Fsync { fh: 6 });
    let falloc = Bytes::default().u64(1).u64(2).u64(3).u32(0x11).u32(0).0;
    let expected = Verb::Fallocate {
        fh: 1,
        offset: 2,
        length: 3,
        mode: 0x11,
    };
    assert_eq!(decoded(FALLOCATE, &falloc), expected);
    let lseek = Bytes::default().u64(1).u64(u64::MAX).u32(4).u32(0).0;
    let expected = Verb::Lseek {
        fh: 1,
        offset: -1,
        whence: 4,
    };
    assert_eq!(decoded(LSEEK, &lseek), expected);
    let two = Bytes::default().u32(2).u32(0).0;
    let mask = AccessFlags::W_OK;
    assert_eq!(decoded(ACCESS, &two), Verb::Access { mask });
    assert_eq!(decoded(LISTXATTR, &two), Verb::Listxattr { size: 2 });
}

#[test]
fn only_what_is_marked_as_given_is_taken_from_setattr() {
    let setattr = |valid: u32| {
        let numbers = Bytes::default().u32(valid).u32(0).u64(1).u64(512).u64(0);
        let times = numbers.u64(10).u64(20).u64(30).u32(1).u32(2).u32(3);
        let fixed = times.u32(0o100_600).u32(0).u32(7).u32(8).u32(0).0;
        decoded(SETATTR, &fixed)
    };
    let none = Wanted::default();
    let nothing = |wanted| Verb::Setattr {
        wanted,
        mtime: None,
    };
    assert_eq!(setattr(0), nothing(none));
    let mode = Some(0o100_600);
    assert_eq!(setattr(1), nothing(Wanted { mode, ..none }));
    let (uid, gid) = (Some(7), Some(8));
    assert_eq!(setattr(6), nothing(Wanted { uid, gid, ..none }));
    let size = Some(512);
    assert_eq!(setattr(8), nothing(Wanted { size, ..none }));
    let mtime = Some(UNIX_EPOCH + Duration::new(20, 2));
    let wanted = none;
    assert_eq!(setattr(1 << 5), Verb::Setattr { wanted, mtime });
    let Verb::Setattr { mtime, .. } = setattr(1 << 5 | 1 << 8) else {
        panic!("no setattr");
    };
    assert!(mtime.unwrap() > UNIX_EPOCH + Duration::from_secs(1 << 30));
    assert_eq!(time(-1, 0), UNIX_EPOCH - Duration::from_secs(1));
    assert_eq!(time(i64::MIN, 5), time(i64::MIN, 5));
}

#[test]
fn names_end_with_a_zero() {
    let name = OsStr::new("disk.img");
    let lookup = decode(&head(LOOKUP), &[], b"disk.img\0rest");
    assert_eq!(lookup, Ok(Verb::Lookup { name }));
    for names in [&b""[..], b"disk.img"] {
        assert_eq!(decode(&head(LOOKUP), &[], names), Err(TooShort));
    }
    let two = Bytes::default().u32(2).u32(0).0;
    let name = OsStr::new("n");
    assert_eq!(decoded(GETXATTR, &two), Verb::Getxattr { name, size: 2 });
    assert!(head(GETXATTR).has_names() && !head(WRITE).has_names());
}

#[test]
fn what_has_no_meaning_here_is_refused_as_it_should_be() {
    let refused = |opcode| match decode(&head(opcode), &[], &[]) {
        Ok(Verb::Refused(refused)) => refused.errno().code(),
        other => panic!("{opcode}: {other:?}"),
    };
    for opcode in [6, 8, 9, 10, 11, 12, 13, 35, 45] {
        assert_eq!(refused(opcode), libc::EPERM, "opcode {opcode}");
    }
    for opcode in [21, 24] {
        assert_eq!(refused(opcode), libc::EOPNOTSUPP, "opcode {opcode}");
    }
    assert_eq!(refused(39), libc::ENOTTY);
    // Of these ENOSYS may be said; of no other that the kernel sends.
    for opcode in [31, 32, 33, 37, 40, 41, 44, 47, 48, 50, 51, 52, 999] {
        assert_eq!(refused(opcode), libc::ENOSYS, "opcode {opcode}");
    }
    for opcode in [2, 36, 42] {
        assert!(head(opcode).wants_no_answer());
    }
}

#[test]
fn the_greeting_is_answered_with_what_both_can() {
    let low = InitFlags::FUSE_ASYNC_READ | InitFlags::FUSE_INIT_EXT | InitFlags::FUSE_ASYNC_DIO;
    let low = u32::try_from(low.bits()).unwrap();
    let long = Bytes::default()
        .u32(7)
        .u32(45)
        .u32(131_072)
        .u32(low)
        .u32(1 << 9)
        .0;
    let offer = Offer::parse(&long).unwrap();
    assert!(offer.flags.contains(InitFlags::FUSE_OVER_IO_URING));
    assert!(!offer.is_too_new() && !offer.is_too_old());
    let flags = InitFlags::FUSE_OVER_IO_URING | InitFlags::FUSE_ASYNC_DIO;
    let flags = flags | InitFlags::FUSE_PASSTHROUGH;
    let out = offer.accept(flags, 1 << 20, 64);
    let expected = Bytes::default()
        .u32(7)
        .u32(42)
        .u32(131_072)
        .u32(1 << 30 | 1 << 15)
        .u16(64)
        .u16(64)
        .u32(1 << 20)
        .u32(1)
        .u16(u16::try_from((1 << 20) / page_bytes()).unwrap())
        .u16(0)
        .u32(1 << 9);
    assert_eq!(out.as_ref().len(), 64);
    assert_eq!(out.as_ref()[..expected.0.len()], expected.0[..]);
    // Without the flag for it, the second word means nothing.
    let short = Bytes::default().u32(7).u32(31).u32(0).u32(1).u32(1 << 9).0;
    let offer = Offer::parse(&short).unwrap();
    assert_eq!(offer.flags, InitFlags::FUSE_ASYNC_READ);
    assert_eq!(Offer::parse(&short[..15]), Err(TooShort));
    assert!(Offer::parse(&short[..16]).is_ok());
    let version = |major, minor| {
        let bytes = Bytes::default().u32(major).u32(minor).u32(0).u32(0).0;
        Offer::parse(&bytes).unwrap()
    };
    assert!(version(8, 0).is_too_new());
    assert!(version(7, 30).is_too_old() && version(6, 99).is_too_old());
    assert_eq!(Offer::version_only()[..], Bytes::default().u32(7).u32(42).0);
}

fn bytes(answer: &impl Encode) -> Vec<u8> {
    let mut all = Vec::new();
    answer.encode(|bytes| all.extend_from_slice(bytes));
    all
}

#[test]
fn answers_are_laid_out_as_the_kernel_reads_them() {
    let time = UNIX_EPOCH + Duration::new(1_700_000_000, 9);
    let attr = FileAttr {
        ino: INodeNo(2),
        size: 512,
        blocks: 1,
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind: FileType::RegularFile,
        perm: 0o640,
        nlink: 1,
        uid: 7,
        gid: 8,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    };
    let of_attr = |all: Bytes| {
        let times = all.u64(2).u64(512).u64(1);
        let times = times
            .u64(1_700_000_000)
            .u64(1_700_000_000)
            .u64(1_700_000_000);
        let rest = times
            .u32(9)
            .u32(9)
            .u32(9)
            .u32(0o100_640)
            .u32(1)
            .u32(7)
            .u32(8);
        rest.u32(0).u32(4096).u32(0)
    };
    let valid = Duration::new(1, 5);
    let entry = Bytes::default().u64(2).u64(0).u64(1).u64(1).u32(5).u32(5);
    assert_eq!(bytes(&Entry { attr, valid }), of_attr(entry).0);
    let short = Bytes::default().u64(1).u32(5).u32(0);
    assert_eq!(bytes(&Attr { attr, valid }), of_attr(short).0);
    let flags = FopenFlags::FOPEN_DIRECT_IO;
    let opened = Opened { fh: 3, flags };
    assert_eq!(bytes(&opened), Bytes::default().u64(3).u32(1).u32(0).0);
    assert_eq!(bytes(&Position(-2)), Bytes::default().u64(u64::MAX - 1).0);
    assert_eq!(bytes(&Xattr::Len(5)), Bytes::default().u32(5).u32(0).0);
    assert_eq!(bytes(&Xattr::Value(b"ab")), b"ab");
    assert_eq!(bytes(&Written(9)), Bytes::default().u32(9).u32(0).0);
    assert_eq!(bytes(&()), b"");
    let volume = bytes(&Volume(Statfs::of(10 << 20, 1 << 20, 4 << 20)));
    let expected = Bytes::default().u64(2560).u64(1536).u64(1536).u64(0).u64(0);
    let expected = expected.u32(1 << 20).u32(255).u32(4096).u32(0);
    assert_eq!(volume.len(), 80);
    assert_eq!(volume[..56], expected.0[..]);
    let whole = Bytes::default().u32(16 + 9).u32(0).u64(77).0;
    assert_eq!(out_head(77, None, 9)[..], whole);
    let error = Bytes::default().u32(16).u32(u32::MAX - 29).u64(77).0;
    assert_eq!(out_head(77, Some(Errno::EROFS), 0)[..], error);
}

#[test]
fn lines_of_a_directory_fill_their_room_and_no_more() {
    let line = |name| Line {
        ino: 5,
        next: 2,
        kind: FileType::Directory,
        name,
    };
    let mut listing = Vec::new();
    assert!(add_line(&mut listing, line("snapshots"), 40));
    let mut expected = Bytes::default().u64(5).u64(2).u32(9).u32(4).0;
    expected.extend_from_slice(b"snapshots\0\0\0\0\0\0\0");
    assert_eq!(listing, expected);
    assert!(!add_line(&mut listing, line("a"), 40 + 31));
    assert_eq!(listing, expected);
    assert!(add_line(&mut listing, line("a"), 40 + 32));
}
