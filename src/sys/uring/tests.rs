//! Slots and rings, without FUSE.

use super::*;
use std::fs::File;
use std::os::fd::AsFd;

#[test]
fn slots_share_nothing() {
    let mut slots = slots(3, 7, 5, 10_000, 5000).unwrap();
    for (number, slot) in (1..).zip(&mut slots) {
        assert_eq!((slot.queue(), slot.home(), slot.is_known()), (3, 7, false));
        assert_eq!(slot.payload().len(), 12_288);
        assert_eq!(slot.payload().as_ptr().addr() % 4096, 0);
        assert_eq!(slot.header().as_ptr().addr() % 8, 0);
        slot.payload_mut().fill(number);
        slot.answer(&[number; 16], u32::from(number));
    }
    // The first to go leaves the memory of the others alone.
    drop(slots.remove(0));
    for (number, slot) in (2..).zip(&slots) {
        assert!(slot.payload().iter().all(|byte| *byte == number));
        assert_eq!(slot.header()[..16], [number; 16]);
        assert_eq!(slot.filled(), usize::from(number));
    }
    // More than there is room for is never believed.
    slots[0].answer(&[], u32::MAX);
    assert_eq!(slots[0].filled(), 12_288);
}

/// Two rings, unless the host lets nobody have any.
fn rings() -> Option<[Ring; 2]> {
    let null = File::open("/dev/zero").unwrap();
    match Ring::new(null.as_fd(), 8, 64) {
        Ok(one) => Some([one, Ring::new(null.as_fd(), 8, 64).unwrap()]),
        Err(e) => {
            assert!(std::env::var("CI").is_err(), "no io_uring: {e}");
            eprintln!("skipped: no io_uring: {e}");
            None
        }
    }
}

#[test]
fn slots_travel_from_ring_to_ring_and_from_elsewhere() {
    let Some([mut one, mut two]) = rings() else {
        return;
    };
    let (to_one, to_two) = (one.mailbox().unwrap(), two.mailbox().unwrap());
    let mut slots = slots(0, 0, 2, 4096, 0).unwrap();
    slots[0].payload_mut()[0] = 1;
    slots[1].payload_mut()[0] = 2;
    let second = slots.pop().unwrap();
    one.pass(&to_two, slots.pop().unwrap()).unwrap();
    one.call(&to_two).unwrap();
    one.submit(0).unwrap();
    two.submit(2).unwrap();
    match two.next_event() {
        Some(Event::Answer(slot)) => {
            assert_eq!(slot.payload()[0], 1);
            std::thread::scope(|scope| {
                scope.spawn(|| to_one.post(slot).unwrap());
            });
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(two.next_event(), Some(Event::Echo)));
    assert!(two.next_event().is_none());
    one.submit(1).unwrap();
    match one.next_event() {
        Some(Event::Answer(slot)) => assert_eq!(slot.payload()[0], 1),
        other => panic!("{other:?}"),
    }
    to_two.post(second).unwrap();
    to_two.stop().unwrap();
    two.submit(2).unwrap();
    assert!(matches!(two.next_event(), Some(Event::Answer(_))));
    assert!(matches!(two.next_event(), Some(Event::Stop)));
}

#[test]
fn a_slot_that_cannot_be_sent_comes_back() {
    let Some([mut one, _]) = rings() else {
        return;
    };
    // A file that is no ring.
    let nobody = Mailbox(File::open("/dev/null").unwrap().into());
    let mut slots = slots(0, 0, 2, 4096, 0).unwrap();
    let (_, slot) = nobody.post(slots.pop().unwrap()).unwrap_err();
    one.pass(&nobody, slot).unwrap();
    one.submit(1).unwrap();
    match one.next_event() {
        Some(Event::Bounced(_)) => {}
        other => panic!("{other:?}"),
    }
    // Who cannot be called is told of as who has come, which does no harm.
    one.call(&nobody).unwrap();
    one.submit(1).unwrap();
    assert!(matches!(one.next_event(), Some(Event::Echo)));
    // And /dev/zero takes no commands.
    one.register(slots.pop().unwrap()).unwrap();
    one.submit(1).unwrap();
    match one.next_event() {
        Some(Event::Ended(slot, errno)) => {
            assert!(!slot.is_known());
            assert_eq!(errno, libc::EOPNOTSUPP);
        }
        other => panic!("{other:?}"),
    }
}

/// What came of the slot's bytes.
fn moved(ring: &mut Ring) -> (Slot, i32) {
    ring.submit(1).unwrap();
    match ring.next_event() {
        Some(Event::Moved(slot, result)) => (slot, result),
        other => panic!("{other:?}"),
    }
}

#[test]
fn bytes_go_between_a_file_and_a_slot() {
    let Some([mut one, _]) = rings() else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x");
    let mut content: Vec<u8> = (0..10_000).map(|at| (at / 16) as u8).collect();
    std::fs::write(&path, &content).unwrap();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let mut slots = slots(0, 0, 2, 8192, 0).unwrap();
    let (mut slot, other) = (slots.pop().unwrap(), slots.pop().unwrap());
    slot.payload_mut().fill(0xee);
    let number = slot.number();
    assert_ne!(number, other.number());
    one.read(slot, file.as_fd(), 1000, 3000).unwrap();
    let (slot, came) = moved(&mut one);
    assert_eq!((slot.number(), came), (number, 3000));
    assert!(slot.payload()[..3000] == content[1000..4000]);
    assert!(slot.payload()[3000..] == [0xee; 5192]);
    // The end of the file, and of the payload.
    one.read(slot, file.as_fd(), 9000, 3000).unwrap();
    let (slot, came) = moved(&mut one);
    assert_eq!(came, 1000);
    one.read(slot, file.as_fd(), 0, 1 << 20).unwrap();
    let (mut slot, came) = moved(&mut one);
    assert_eq!(came, 8192);
    slot.payload_mut().fill(7);
    one.write(slot, file.as_fd(), 500, 2000).unwrap();
    let (slot, went) = moved(&mut one);
    assert_eq!(went, 2000);
    content[500..2500].fill(7);
    assert!(std::fs::read(&path).unwrap() == content);
    let file = File::open(&path).unwrap();
    one.write(slot, file.as_fd(), 500, 2000).unwrap();
    let (_, went) = moved(&mut one);
    assert_eq!(went, -libc::EBADF);
    assert!(std::fs::read(&path).unwrap() == content);
}
