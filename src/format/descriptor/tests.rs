//! A good descriptor, changed in one place at a time.

use super::*;
use crate::format::xml::XmlError;

const A: &str = "{0c2f3f0e-71c4-4a55-8f2e-6a1f3d0b9c11}";
const TOP: &str = "{5fbaabe3-6958-40ff-92a7-860e329aab41}";
const NONE: &str = "{00000000-0000-0000-0000-000000000000}";

fn guid(text: &str) -> Guid {
    Guid::parse(text).unwrap()
}

/// A disk with one snapshot, as ploop writes it.
fn good() -> String {
    format!(
        "<?xml version=\"1.0\"?>
<Parallels_disk_image Version=\"1.0\">
  <Disk_Parameters>
    <Disk_size>20480</Disk_size>
    <Padding>0</Padding>
    <Unknown><Deep/></Unknown>
  </Disk_Parameters>
  <StorageData>
    <Storage>
      <Start>0</Start><End>20480</End><Blocksize>2048</Blocksize>
      <Image><GUID>{A}</GUID><Type>Compressed</Type><File>root.hds</File></Image>
      <Image><GUID>{TOP}</GUID><Type>Compressed</Type><File>root.hds.1</File></Image>
    </Storage>
  </StorageData>
  <Snapshots>
    <TopGUID>{TOP}</TopGUID>
    <Shot><GUID>{A}</GUID><ParentGUID>{NONE}</ParentGUID></Shot>
    <Shot><GUID>{TOP}</GUID><ParentGUID>{A}</ParentGUID></Shot>
  </Snapshots>
</Parallels_disk_image>
"
    )
}

fn parse(text: &str) -> Result<Descriptor, DescriptorError> {
    Descriptor::parse(text.as_bytes())
}

/// The good document with one piece replaced, which must be there.
fn patched(from: &str, to: &str) -> Result<Descriptor, DescriptorError> {
    let good = good();
    assert!(good.contains(from), "{from} is not in the document");
    parse(&good.replacen(from, to, 1))
}

fn oddities(from: &str, to: &str) -> Vec<Oddity> {
    patched(from, to).unwrap().oddities
}

#[test]
fn a_good_document_says_what_it_says() {
    let found = parse(&good()).unwrap();
    assert_eq!(found.oddities, vec![]);
    assert_eq!(
        (found.root.clone(), found.disk_size.get()),
        (Root::Parallels, 20480)
    );
    assert_eq!((found.padding, found.encryption.clone()), (false, None));
    assert_eq!(found.top, Guid::TOP);
    let part = &found.parts[0];
    assert_eq!(
        (part.start.get(), part.end.get(), part.blocksize),
        (0, 20480, Some(2048))
    );
    let chain = found.chain(found.top).unwrap();
    assert_eq!(chain, [guid(A), Guid::TOP]);
    let images = found.images(0, &chain).unwrap();
    assert_eq!(
        images.iter().map(|i| i.file.as_str()).collect::<Vec<_>>(),
        ["root.hds", "root.hds.1"]
    );
    assert_eq!(found.chain(guid(A)).unwrap(), [guid(A)]);
    assert_eq!(
        found
            .frozen()
            .iter()
            .map(|shot| shot.guid)
            .collect::<Vec<_>>(),
        [guid(A)]
    );
}

#[test]
fn what_is_not_xml_is_refused_with_its_line() {
    assert_eq!(parse(""), Err(DescriptorError::Xml(XmlError::Empty)));
    let cut = patched("</Storage>", "").unwrap_err();
    assert!(cut.to_string().starts_with("line 14: "), "{cut}");
    let unclosed = parse("<Parallels_disk_image>").unwrap_err();
    assert!(matches!(
        unclosed,
        DescriptorError::Xml(XmlError::Malformed { .. })
    ));
    let dtd = format!(
        "<!DOCTYPE x SYSTEM \"file:///etc/passwd\">{}",
        &good()[22..]
    );
    assert!(matches!(
        parse(&dtd),
        Err(DescriptorError::Xml(XmlError::Malformed { .. }))
    ));
}

#[test]
fn roots() {
    let virtuozzo = good().replace("Parallels_disk_image", "Virtuozzo_disk_image");
    let found = parse(&virtuozzo).unwrap();
    assert_eq!((found.root, found.oddities), (Root::Virtuozzo, vec![]));
    let other = parse(&good().replace("Parallels_disk_image", "foo")).unwrap();
    assert_eq!(other.root, Root::Other("foo".into()));
    assert_eq!(other.oddities, [Oddity::RootName("foo".into())]);
    let marked = format!("\u{feff}{}", good());
    assert!(parse(&marked).is_ok());
}

#[test]
fn without_snapshots_there_must_be_one_image() {
    let good = good();
    let (start, end) = (
        good.find("<Snapshots>").unwrap(),
        good.find("</Snapshots>").unwrap(),
    );
    let without = format!("{}{}", &good[..start], &good[end + 12..]);
    assert_eq!(
        parse(&without),
        Err(DescriptorError::Missing {
            element: "Snapshots",
            line: 2
        })
    );
    let image = without.find("<Image>").unwrap();
    let second = without.rfind("<Image>").unwrap();
    let one = format!("{}{}", &without[..image], &without[second..]);
    let found = parse(&one).unwrap();
    assert_eq!(found.oddities, [Oddity::NoSnapshots]);
    assert_eq!(found.chain(found.top).unwrap(), [Guid::TOP]);
}

#[test]
fn tops() {
    let line = format!("<TopGUID>{TOP}</TopGUID>");
    assert_eq!(patched(&line, "").unwrap().top, Guid::TOP);
    let unknown = "{11111111-71c4-4a55-8f2e-6a1f3d0b9c11}";
    assert_eq!(
        patched(&line, &format!("<TopGUID>{unknown}</TopGUID>")),
        Err(DescriptorError::TopUnknown(guid(unknown)))
    );
    // Neither a TopGUID nor the default name: the only leaf is the top.
    let renamed = good().replace(&line, "").replace(TOP, unknown);
    let found = parse(&renamed).unwrap();
    assert_eq!(found.top, guid(unknown));
    assert_eq!(found.oddities, [Oddity::TopGuessed(guid(unknown))]);
    // Two leaves: nothing says which.
    let two = renamed.replace(&format!("<ParentGUID>{A}"), &format!("<ParentGUID>{NONE}"));
    assert_eq!(parse(&two), Err(DescriptorError::NoTop));
}

#[test]
fn guids_are_read_in_any_spelling_and_are_unique() {
    let upper = good().replace(A, &A.to_uppercase()[1..37]);
    assert_eq!(parse(&upper).unwrap().snapshots[0].guid, guid(A));
    assert_eq!(
        patched(&format!("<GUID>{A}"), "<GUID>{0c2f}"),
        Err(DescriptorError::Guid {
            element: "GUID",
            line: 11
        })
    );
    assert_eq!(
        patched(&format!("<Image><GUID>{A}"), &format!("<Image><GUID>{TOP}")),
        Err(DescriptorError::DuplicateImage {
            guid: Guid::TOP,
            line: 12
        })
    );
    assert_eq!(
        patched(&format!("<Shot><GUID>{A}"), &format!("<Shot><GUID>{TOP}")),
        Err(DescriptorError::DuplicateShot {
            guid: Guid::TOP,
            line: 18
        })
    );
}

#[test]
fn chains_that_do_not_end_at_a_root_are_refused() {
    let itself = patched(&format!("<ParentGUID>{A}"), &format!("<ParentGUID>{TOP}")).unwrap();
    assert_eq!(
        itself.chain(Guid::TOP),
        Err(DescriptorError::Cycle(Guid::TOP))
    );
    let round = patched(
        &format!("<ParentGUID>{NONE}"),
        &format!("<ParentGUID>{TOP}"),
    )
    .unwrap();
    assert_eq!(round.chain(guid(A)), Err(DescriptorError::Cycle(guid(A))));
    assert_eq!(round.frozen(), Vec::<&Shot>::new());
    let far = "{11111111-71c4-4a55-8f2e-6a1f3d0b9c11}";
    let lost = patched(&format!("<ParentGUID>{A}"), &format!("<ParentGUID>{far}")).unwrap();
    assert_eq!(
        lost.chain(Guid::TOP),
        Err(DescriptorError::ParentMissing {
            guid: Guid::TOP,
            parent: guid(far)
        })
    );
    assert_eq!(
        lost.chain(guid(far)),
        Err(DescriptorError::NoSuchShot(guid(far)))
    );
    // Two roots: each is a chain of its own.
    let two = patched(&format!("<ParentGUID>{A}"), &format!("<ParentGUID>{NONE}")).unwrap();
    assert_eq!(two.chain(Guid::TOP).unwrap(), [Guid::TOP]);
}

#[test]
fn images_and_shots_that_do_not_match() {
    let stray = "{11111111-71c4-4a55-8f2e-6a1f3d0b9c11}";
    let from = format!("<Image><GUID>{A}");
    let found = patched(&from, &format!("<Image><GUID>{stray}")).unwrap();
    assert_eq!(found.oddities, [Oddity::ImageWithoutShot(guid(stray))]);
    let chain = found.chain(Guid::TOP).unwrap();
    assert_eq!(
        found.images(0, &chain),
        Err(DescriptorError::ImageMissing {
            guid: guid(A),
            part: 0
        })
    );
}

#[test]
fn numbers() {
    let number = |text: &str| {
        let to = format!("<Disk_size>{text}</Disk_size>");
        patched("<Disk_size>20480</Disk_size>", &to)
    };
    assert_eq!(number("0x5000").unwrap().oddities, vec![]);
    assert_eq!(number(" 20480\n").unwrap().disk_size.get(), 20480);
    for bad in [
        "",
        "-1",
        "+1",
        "1e3",
        "0x",
        "0x+1",
        "99999999999999999999",
        "18014398509481984",
    ] {
        assert_eq!(
            number(bad),
            Err(DescriptorError::Number {
                element: "Disk_size",
                line: 4
            }),
            "{bad}"
        );
    }
    for bad in ["", "0", "x", "4186128"] {
        let to = format!("<Blocksize>{bad}</Blocksize>");
        assert_eq!(
            oddities("<Blocksize>2048</Blocksize>", &to),
            [Oddity::Blocksize(0)]
        );
    }
    assert_eq!(
        oddities("<Blocksize>2048</Blocksize>", "<Blocksize>63</Blocksize>"),
        vec![]
    );
}

#[test]
fn bounds_of_an_only_part_forbid_writing_at_most() {
    let odd = Oddity::Bounds {
        start: 2048,
        end: 20480,
        disk_size: 20480,
    };
    assert!(odd.forbids_writing());
    assert_eq!(oddities("<Start>0", "<Start>2048"), [odd]);
    assert_eq!(oddities("<Start>0</Start><End>20480</End>", ""), vec![]);
    assert_eq!(oddities("<Padding>0", "<Padding>1"), [Oddity::Padding]);
    assert!(Oddity::Padding.forbids_writing());
}

fn split(bounds: [(u64, u64); 3]) -> Result<Descriptor, DescriptorError> {
    let mut text = good();
    let (start, end) = (
        text.find("<Storage>").unwrap(),
        text.find("</Storage>").unwrap() + 10,
    );
    let storage = text[start..end].to_owned();
    let parts: String = bounds
        .iter()
        .map(|(start, end)| {
            storage
                .replace("<Start>0", &format!("<Start>{start}"))
                .replace("<End>20480", &format!("<End>{end}"))
        })
        .collect();
    text.replace_range(start..end, &parts);
    parse(&text)
}

#[test]
fn split_parts_join() {
    let found = split([(0, 4096), (4096, 8192), (8192, 20480)]).unwrap();
    assert_eq!((found.parts.len(), found.oddities.len()), (3, 0));
    assert!(found.images(2, &[guid(A), Guid::TOP]).is_ok());
    assert_eq!(
        split([(8192, 20480), (0, 4096), (4096, 8192)])
            .unwrap()
            .parts[2]
            .end
            .get(),
        20480
    );
    assert_eq!(
        split([(0, 4096), (4097, 8192), (8192, 20480)]),
        Err(DescriptorError::Gap {
            part: 1,
            start: 4097,
            expected: 4096
        })
    );
    assert_eq!(
        split([(0, 4096), (4095, 8192), (8192, 20480)]),
        Err(DescriptorError::Gap {
            part: 1,
            start: 4095,
            expected: 4096
        })
    );
    assert_eq!(
        split([(0, 0), (0, 8192), (8192, 20480)]),
        Err(DescriptorError::EmptyPart { part: 0, end: 0 })
    );
    assert_eq!(
        split([(0, 4096), (4096, 8192), (8192, 20481)]),
        Err(DescriptorError::WrongEnd {
            end: 20481,
            disk_size: 20480
        })
    );
}

#[test]
fn encryption_is_told_apart() {
    let with = |inner: &str| {
        let to = format!("<Padding>0</Padding><Encryption>{inner}</Encryption>");
        patched("<Padding>0</Padding>", &to).unwrap().encryption
    };
    assert_eq!(with(&format!("<Engine>{NONE}</Engine><Data></Data>")), None);
    assert_eq!(
        with("<KeyId>k1</KeyId>"),
        Some(Encryption::Key("k1".into()))
    );
    assert_eq!(
        with(&format!("<Engine>{A}</Engine>")),
        Some(Encryption::Engine(A.into()))
    );
}

#[test]
fn names_are_kept_as_written_and_types_tolerated() {
    let found = patched("<File>root.hds<", "<File>\n../a &amp; b<").unwrap();
    assert_eq!(found.parts[0].images[0].file, "\n../a & b");
    assert_eq!(
        patched("<File>root.hds<", "<File><"),
        Err(DescriptorError::EmptyName { line: 11 })
    );
    assert_eq!(
        oddities("Compressed", "compressed"),
        [Oddity::ImageTypeWord(guid(A))]
    );
    assert_eq!(
        patched("Compressed", "Plain").unwrap().parts[0].images[0].kind,
        ImageType::Plain
    );
}

#[test]
fn marks_of_other_programs() {
    let to = format!("<Shot><Temporary/><GUID>{A}");
    let found = patched(&format!("<Shot><GUID>{A}"), &to).unwrap();
    assert_eq!(found.oddities, [Oddity::Temporary(guid(A))]);
    let volume = "<StorageData><Volume><Parent>/vz/base</Parent></Volume>";
    assert_eq!(
        patched("<StorageData>", volume),
        Err(DescriptorError::ParentVolume { line: 8 })
    );
}

#[test]
fn counts_are_bounded() {
    let shot = |i: usize| {
        format!(
            "<Shot><GUID>{i:08x}-0000-0000-0000-000000000001</GUID>\
             <ParentGUID>{NONE}</ParentGUID></Shot>"
        )
    };
    let shots: String = (0..4096).map(shot).collect();
    let result = patched("<Snapshots>", &format!("<Snapshots>{shots}"));
    assert_eq!(result, Err(DescriptorError::TooMany("snapshots")));
    let storage: String = "<Storage/>".repeat(4097);
    let result = patched("<StorageData>", &format!("<StorageData>{storage}"));
    assert_eq!(result, Err(DescriptorError::TooMany("parts")));
}

/// Every single-byte change, and random ones: an answer, never a panic.
#[test]
fn changed_bytes_never_panic() {
    let good = good().into_bytes();
    for at in 0..good.len() {
        for byte in [0, b'<', b'>', b'"', b'&', b'{', b'9', 0xff, good[at] ^ 1] {
            let mut bytes = good.clone();
            bytes[at] = byte;
            probe(&bytes);
        }
        probe(&good[..at]);
    }
    let mut state = 1_u64;
    let mut random = |below: usize| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(state >> 33).unwrap() % below
    };
    for _ in 0..3000 {
        let mut bytes = good.clone();
        for _ in 0..=random(6) {
            let (from, to, len) = (random(bytes.len()), random(bytes.len()), random(40));
            let piece = bytes[from..bytes.len().min(from + len)].to_vec();
            if random(2) == 0 {
                bytes.splice(to..to, piece);
            } else {
                bytes.drain(to..bytes.len().min(to + len).max(to));
            }
            if bytes.is_empty() {
                break;
            }
        }
        probe(&bytes);
    }
}

fn probe(bytes: &[u8]) {
    if let Ok(found) = Descriptor::parse(bytes) {
        for shot in &found.snapshots {
            if let Ok(chain) = found.chain(shot.guid) {
                for part in 0..found.parts.len() {
                    let _ = found.images(part, &chain);
                }
            }
        }
        assert!(found.frozen().len() < found.snapshots.len());
        for oddity in &found.oddities {
            assert!(!oddity.to_string().is_empty());
        }
    }
}
