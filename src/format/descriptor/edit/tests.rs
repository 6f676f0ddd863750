//! Edits: the bytes that change, those that do not, and what is refused.

use super::*;
use proptest::prelude::*;

const A: &str = "{0c2f3f0e-71c4-4a55-8f2e-6a1f3d0b9c11}";
const B: &str = "{1c2f3f0e-71c4-4a55-8f2e-6a1f3d0b9c11}";
const TOP: &str = "{5fbaabe3-6958-40ff-92a7-860e329aab41}";
const NONE: &str = "{00000000-0000-0000-0000-000000000000}";

fn guid(text: &str) -> Guid {
    Guid::parse(text).unwrap()
}

/// Lines as this program's source has them, with line ends of another world and names filled in.
fn lines(text: &str) -> String {
    text.replace('\n', "\r\n")
        .replace("TOP", TOP)
        .replace("NONE", NONE)
        .replace("AAA", A)
}

/// A descriptor full of what is not understood.
fn odd() -> String {
    let text = "<?xml version='1.0' encoding='UTF-8'?>
<!-- made by hand -->
<Parallels_disk_image Version=\"1.0\" more='&lt;'>
    <Disk_Parameters>
\t<Disk_size> 204800<!-- sectors --></Disk_size>
        <Cylinders>400</Cylinders>
        <Heads>16</Heads><Sectors>32</Sectors>
        <Padding>0</Padding>
        <Unknown a='>'/>
    </Disk_Parameters>
    <StorageData>
        <Storage kind=\"x\">
            <Start>0</Start>
            <End>204800</End>
            <Blocksize>2048</Blocksize>
            <Image n='1'>
                <GUID>TOP</GUID>
                <Type>Compressed</Type>
                <File>x&amp;y.hds</File>
                <Extra/>
            </Image>
        </Storage>
    </StorageData>
    <Snapshots>
        <Shot>
            <GUID>TOP</GUID>
            <ParentGUID>NONE</ParentGUID>
            <Note>kept</Note>
        </Shot>
    </Snapshots>
</Parallels_disk_image>
<!-- end -->
";
    format!("\u{feff}{}", lines(text))
}

fn create(part: usize, file: &str) -> Vec<Edit> {
    vec![
        Edit::RenameImages {
            from: Guid::TOP,
            to: guid(A),
        },
        Edit::RenameShot {
            from: Guid::TOP,
            to: guid(A),
        },
        Edit::AddImage {
            part,
            image: Image {
                guid: Guid::TOP,
                kind: ImageType::Compressed,
                file: file.to_owned(),
            },
        },
        Edit::AddShot {
            guid: Guid::TOP,
            parent: Some(guid(A)),
        },
    ]
}

fn edited(text: &str, edits: &[Edit]) -> String {
    String::from_utf8(edit(text.as_bytes(), edits).unwrap()).unwrap()
}

#[test]
fn a_new_top_changes_nothing_else() {
    let old = odd();
    let new = edited(&old, &create(0, "x&<y>.hds.{1}"));
    let image = lines(
        "</Image>
            <Image>
                <GUID>TOP</GUID>
                <Type>Compressed</Type>
                <File>x&amp;&lt;y&gt;.hds.{1}</File>
            </Image>",
    );
    let shot = lines(
        "</Shot>
        <Shot>
            <GUID>TOP</GUID>
            <ParentGUID>AAA</ParentGUID>
        </Shot>",
    );
    let expected = old
        .replace(TOP, A)
        .replace("</Image>", &image)
        .replace("</Shot>", &shot);
    assert_eq!(new, expected);
}

#[test]
fn a_merge_takes_back_what_a_new_top_made() {
    let with_two = edited(&odd(), &create(0, "new.hds"));
    let back = edited(
        &with_two,
        &[
            Edit::RemoveImages(Guid::TOP),
            Edit::RenameImages {
                from: guid(A),
                to: Guid::TOP,
            },
            Edit::RemoveShot(guid(A)),
            Edit::SetParent {
                guid: Guid::TOP,
                parent: None,
            },
        ],
    );
    // The shot that is left is the younger one, which has no note.
    let expected = odd().replace("            <Note>kept</Note>\r\n", "");
    assert_eq!(back, expected);
}

#[test]
fn a_mark_is_set_once() {
    let old = odd();
    let marked = edited(&old, &[Edit::Mark(Guid::TOP)]);
    let with = "<Note>kept</Note>\r\n            <Temporary/>";
    assert_eq!(marked, old.replace("<Note>kept</Note>", with));
    assert_eq!(edited(&marked, &[Edit::Mark(Guid::TOP)]), marked);
}

#[test]
fn a_size_is_told_in_all_places() {
    let new = edited(&odd(), &[Edit::DiskSize(SectorCount::new(409_600))]);
    let expected = odd().replace("204800", "409600").replace(">400<", ">800<");
    assert_eq!(new, expected);
}

#[test]
fn split_disks_are_edited_in_disk_order() {
    let storage = |start: u64, end: u64, file: &str| {
        format!(
            "<Storage><Start>{start}</Start><End>{end}</End><Blocksize>8</Blocksize>\
<Image><GUID>{TOP}</GUID><Type>Compressed</Type><File>{file}</File></Image></Storage>"
        )
    };
    let text = |one: &str, two: &str, shots: &str| {
        format!(
            "<Virtuozzo_disk_image><Disk_Parameters><Disk_size>80</Disk_size></Disk_Parameters>\
<StorageData>{}{}</StorageData><Snapshots><TopGUID>{TOP}</TopGUID>{shots}</Snapshots>\
</Virtuozzo_disk_image>",
            storage(40, 80, "b").replace("</Storage>", &format!("{two}</Storage>")),
            storage(0, 40, "a").replace("</Storage>", &format!("{one}</Storage>")),
        )
    };
    let shot = |own: &str, parent: &str| {
        format!("<Shot><GUID>{own}</GUID><ParentGUID>{parent}</ParentGUID></Shot>")
    };
    let mut edits = create(0, "a2");
    edits.extend(create(1, "b2").into_iter().skip(2).take(1));
    let image = |file: &str| {
        format!("<Image><GUID>{TOP}</GUID><Type>Compressed</Type><File>{file}</File></Image>")
    };
    let old = text("", "", &shot(TOP, NONE));
    let new = edited(&old, &edits);
    let expected = text("", "", "")
        .replace(&format!("<GUID>{TOP}"), &format!("<GUID>{A}"))
        .replace(
            "</Image></Storage><Storage>",
            &format!("</Image>{}</Storage><Storage>", image("b2")),
        )
        .replace(
            "</Image></Storage></S",
            &format!("</Image>{}</Storage></S", image("a2")),
        )
        .replace(
            "</Snap",
            &format!("{}{}</Snap", shot(A, NONE), shot(TOP, A)),
        );
    assert_eq!(new, expected);
    let size = edited(&old, &[Edit::DiskSize(SectorCount::new(96))]);
    assert_eq!(size, old.replace(">80<", ">96<"));
}

#[test]
fn a_tree_is_made_where_there_is_none() {
    let old = odd();
    let start = old.find("\r\n    <Snapshots>").unwrap();
    let end = old.find("\r\n</Parallels_disk_image>").unwrap();
    let bare = format!("{}{}", &old[..start], &old[end..]);
    let new = edited(&bare, &create(0, "n"));
    let parsed = Descriptor::parse(new.as_bytes()).unwrap();
    assert_eq!(parsed.snapshots.len(), 2);
    assert_eq!(parsed.chain(Guid::TOP).unwrap(), [guid(A), Guid::TOP]);
    assert!(new.starts_with(&bare[..start].replace(TOP, A)[..bare.find(TOP).unwrap()]));
    assert!(new.ends_with(&old[end..]));
    // A new size needs none.
    let sized = edited(&bare, &[Edit::DiskSize(SectorCount::new(409_600))]);
    assert!(!sized.contains("Snapshots"));
}

#[test]
fn what_is_not_there_is_not_changed() {
    let old = odd();
    for edits in [
        vec![Edit::RemoveShot(guid(B))],
        vec![Edit::RemoveImages(guid(B))],
        vec![Edit::Mark(guid(B))],
        vec![Edit::AddImage {
            part: 1,
            image: Image {
                guid: guid(B),
                kind: ImageType::Plain,
                file: "f".to_owned(),
            },
        }],
    ] {
        let refused = edit(old.as_bytes(), &edits).unwrap_err();
        assert!(matches!(refused, EditError::Absent(_)), "{edits:?}");
    }
    // A change that leaves no descriptor, and one that touches what goes.
    for edits in [
        vec![Edit::RemoveImages(Guid::TOP)],
        vec![
            Edit::RemoveShot(Guid::TOP),
            Edit::RenameShot {
                from: Guid::TOP,
                to: guid(A),
            },
        ],
        vec![Edit::RenameShot {
            from: Guid::TOP,
            to: guid(A),
        }],
    ] {
        assert!(edit(old.as_bytes(), &edits).is_err(), "{edits:?}");
    }
}

/// Whatever a descriptor looks like, an edit gives one that means what it should, or none.
#[test]
fn no_descriptor_makes_an_edit_panic() {
    let good = odd();
    let mut seed = 1_u64;
    let mut random = move |below: usize| {
        seed = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(seed >> 33).expect("31 bits fit") % below
    };
    let pieces = [
        "<", "/>", "<GUID>", "</Shot>", "<!--", "-->", "&", "<Image/>", "\u{e9}", " ",
    ];
    let mut made = 0;
    for _ in 0..3000 {
        let mut text = good.clone();
        for _ in 0..1 + random(2) {
            let at = random(text.len());
            let end = at + random(12);
            if text.is_char_boundary(at) && text.is_char_boundary(end.min(text.len())) {
                let piece = pieces[random(pieces.len())];
                text.replace_range(at..end.min(text.len()), piece);
            }
        }
        for edits in [create(0, "n"), vec![Edit::DiskSize(SectorCount::new(80))]] {
            made += usize::from(edit(text.as_bytes(), &edits).is_ok());
        }
    }
    assert!(made > 100, "{made}");
}

/// Writes a value in pieces, as it is and with another one in its place; each number adds a piece.
fn written(value: &str, to: &str, pieces: &[u8]) -> (String, String) {
    let (mut old, mut new) = (String::new(), String::new());
    let mut rest = value;
    let mut with = to;
    for (index, piece) in pieces.iter().enumerate() {
        let left = pieces.len() - index;
        let (own, others) = rest.split_at(rest.len().div_ceil(left));
        let kept = match piece {
            0 => "<!-- <GUID> > ' - >-->".to_owned(),
            1 => "<?keep <this> \"?>".to_owned(),
            2 if rest.len() == value.len() || rest.is_empty() => "\r\n\t ".to_owned(),
            _ => String::new(),
        };
        if !kept.is_empty() {
            old.push_str(&kept);
            new.push_str(&kept);
            continue;
        }
        match piece {
            3 => old.push_str(&format!("<![CDATA[{own}]]>")),
            4 => old.extend(own.chars().map(|c| format!("&#{};", u32::from(c)))),
            _ => old.push_str(own),
        }
        if !own.is_empty() {
            new.push_str(with);
            with = "";
        } else if *piece == 3 {
            new.push_str("<![CDATA[]]>");
        }
        rest = others;
    }
    old.push_str(rest);
    new.push_str(if rest.is_empty() { "" } else { with });
    (old, new)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

    /// However the touched texts are written: they get their new values, and every other byte is
    /// as it was.
    #[test]
    fn edits_change_values_and_nothing_else(
        pieces in prop::collection::vec(prop::collection::vec(0_u8..6, 0..5), 7),
        between in prop::collection::vec(0_u8..3, 6),
    ) {
        let gap = |number: usize| match between[number] {
            0 => "\n  ",
            1 => "<!-- <Shot/> -->",
            _ => "<?x?> ",
        };
        let text = |values: &[(String, String)], new: bool| {
            let value = |number: usize| {
                let (old, changed): &(String, String) = &values[number];
                if new { changed } else { old }
            };
            format!(
                "<Parallels_disk_image><Disk_Parameters>{}<Disk_size a='>'>{}</Disk_size>{}\
<Cylinders>{}</Cylinders><Heads>16</Heads><Sectors>32</Sectors></Disk_Parameters><StorageData>\
<Storage><Start>0</Start>{}<End b=\"/>'\">{}</End><Blocksize>2048</Blocksize><Image>{}\
<GUID>{}</GUID><Type>Compressed</Type><File>x</File></Image></Storage></StorageData>\
<Snapshots><Shot>{}<GUID>{}</GUID><ParentGUID>{NONE}</ParentGUID></Shot><Shot>{}\
<GUID>{}</GUID><ParentGUID>{}</ParentGUID></Shot></Snapshots></Parallels_disk_image>",
                gap(0), value(0), gap(1), value(1), gap(2), value(2), gap(3), value(3),
                gap(4), value(4), gap(5), value(5), value(6),
            )
        };
        let values: Vec<_> = [
            ("204800", "409600"), ("400", "800"), ("204800", "409600"), (A, TOP), (A, B),
            // The youngest has no image any more, which is for others to mind.
            (TOP, TOP), (A, B),
        ]
        .into_iter()
        .zip(&pieces)
        .map(|((value, to), pieces)| written(value, to, pieces))
        .collect();
        let old = text(&values, false);
        let mut expected = values.clone();
        expected[5].1.clone_from(&values[5].0);
        let edits = [
            Edit::DiskSize(SectorCount::new(409_600)),
            Edit::RenameImages { from: guid(A), to: Guid::TOP },
            Edit::RenameShot { from: guid(A), to: guid(B) },
        ];
        prop_assert_eq!(edited(&old, &edits), text(&expected, true));
    }
}

#[test]
fn odd_ways_to_write_a_text_are_changed() {
    for (guid_text, number) in [
        (format!("<![CDATA[{TOP}]]>"), 1),
        (format!("<!-- a -->{}<!-- b -->{}", &TOP[..7], &TOP[7..]), 2),
        (format!("\n\t{}\n", TOP.to_uppercase()), 3),
        (TOP.replace('5', "&#53;"), 4),
    ] {
        let old = odd().replacen(TOP, &guid_text, 1);
        let new = edited(&old, &create(0, "n"));
        let new = Descriptor::parse(new.as_bytes()).unwrap();
        assert_eq!(new.parts[0].images[0].guid, guid(A), "{number}");
    }
}
