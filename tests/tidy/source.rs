//! Rust text seen without its comments, strings and test modules, and cut into functions.

/// Which part of the text a reader wants to keep; the rest becomes spaces, lines stay.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Code,
    Comment,
    Text,
}

/// Marks every byte of Rust text as code, comment, or inside of a string or character literal.
fn classify(text: &str) -> Vec<Part> {
    let bytes = text.as_bytes();
    let mut parts = vec![Part::Code; bytes.len()];
    let mut at = 0;
    while at < bytes.len() {
        let rest = &bytes[at..];
        let (len, part) = if rest.starts_with(b"//") {
            (line_len(rest), Part::Comment)
        } else if rest.starts_with(b"/*") {
            (block_comment_len(rest), Part::Comment)
        } else if let Some(len) = raw_string_len(bytes, at) {
            (len, Part::Text)
        } else if rest[0] == b'"' {
            (string_len(rest), Part::Text)
        } else if let Some(len) = char_len(rest) {
            (len, Part::Text)
        } else {
            (1, Part::Code)
        };
        parts[at..at + len].fill(part);
        at += len;
    }
    parts
}

fn line_len(rest: &[u8]) -> usize {
    rest.iter().position(|b| *b == b'\n').unwrap_or(rest.len())
}

/// Block comments nest.
fn block_comment_len(rest: &[u8]) -> usize {
    let (mut depth, mut at) = (0_usize, 0);
    while at < rest.len() {
        if rest[at..].starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if rest[at..].starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    rest.len()
}

fn string_len(rest: &[u8]) -> usize {
    let mut at = 1;
    while at < rest.len() {
        match rest[at] {
            b'\\' => at += 2,
            b'"' => return at + 1,
            _ => at += 1,
        }
    }
    rest.len()
}

/// `r"..."`, `r#"..."#` and their byte forms, but not the raw identifier `r#type`.
fn raw_string_len(bytes: &[u8], at: usize) -> Option<usize> {
    let before = at.checked_sub(1).map(|i| bytes[i]);
    let in_word = before.is_some_and(|b| b.is_ascii_alphanumeric() || b == b'_');
    // `br` is reached at its `b` first, whose next byte is the `r`.
    let rest = bytes[at..].strip_prefix(b"b").unwrap_or(&bytes[at..]);
    if in_word || rest.first() != Some(&b'r') {
        return None;
    }
    let hashes = rest[1..].iter().take_while(|b| **b == b'#').count();
    if rest.get(1 + hashes) != Some(&b'"') {
        return None;
    }
    let body = bytes.len() - rest.len() + 2 + hashes;
    let end = format!("\"{}", "#".repeat(hashes)).into_bytes();
    let found = bytes[body..]
        .windows(end.len())
        .position(|window| window == end);
    Some(found.map_or(bytes.len(), |i| body + i + end.len()) - at)
}

/// A character literal, told from a lifetime by its closing quote.
fn char_len(rest: &[u8]) -> Option<usize> {
    if rest[0] != b'\'' {
        return None;
    }
    if rest.get(1) == Some(&b'\\') {
        let close = rest.iter().skip(3).position(|b| *b == b'\'')?;
        return Some(close + 4);
    }
    // One character of any width.
    let close = rest.iter().take(6).skip(2).position(|b| *b == b'\'')? + 2;
    let one = std::str::from_utf8(&rest[1..close]).is_ok_and(|s| s.chars().count() == 1);
    one.then_some(close + 1)
}

fn keep(text: &str, wanted: Part) -> String {
    let parts = classify(text);
    let kept = text.bytes().zip(parts).map(|(byte, part)| match byte {
        b'\n' => b'\n',
        _ if part == wanted => byte,
        _ => b' ',
    });
    String::from_utf8_lossy(&kept.collect::<Vec<_>>()).into_owned()
}

/// The code alone: comments and the inside of literals are blank.
pub(crate) fn code(text: &str) -> String {
    keep(text, Part::Code)
}

/// The comments alone.
pub(crate) fn comments(text: &str) -> String {
    keep(text, Part::Comment)
}

/// Index just after the brace that closes the one at `open`, or the end.
fn block_end(code: &[u8], open: usize) -> usize {
    let mut depth = 0_usize;
    for (at, byte) in code.iter().enumerate().skip(open) {
        match byte {
            b'{' => depth += 1,
            b'}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return at + 1;
        }
    }
    code.len()
}

/// The code without its `#[cfg(test)]` items.
pub(crate) fn shipped_code(text: &str) -> String {
    let mut code = code(text).into_bytes();
    let mark = b"#[cfg(test)]";
    while let Some(start) = code.windows(mark.len()).position(|window| window == mark) {
        let body = code[start..].iter().position(|b| *b == b'{' || *b == b';');
        let end = match body.map(|i| start + i) {
            Some(open) if code[open] == b'{' => block_end(&code, open),
            Some(semicolon) => semicolon + 1,
            None => code.len(),
        };
        for byte in &mut code[start..end] {
            if *byte != b'\n' {
                *byte = b' ';
            }
        }
    }
    String::from_utf8(code).unwrap()
}

/// The words that are identifiers or keywords, with their byte positions.
pub(crate) fn words(code: &str) -> impl Iterator<Item = (usize, &str)> {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let mut at = 0;
    std::iter::from_fn(move || {
        let start = at + code[at..].find(is_word)?;
        let len = code[start..]
            .find(|c| !is_word(c))
            .unwrap_or(code.len() - start);
        at = start + len;
        Some((start, &code[start..at]))
    })
}

pub(crate) fn line_of(text: &str, at: usize) -> usize {
    text[..at].matches('\n').count() + 1
}

/// A function with a body: its name, first line, and number of lines.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Function {
    pub(crate) name: String,
    pub(crate) line: usize,
    pub(crate) lines: usize,
}

pub(crate) fn functions(text: &str) -> Vec<Function> {
    let code = code(text);
    let bytes = code.as_bytes();
    let all: Vec<(usize, &str)> = words(&code).collect();
    let mut found = Vec::new();
    for pair in all.windows(2) {
        let [(start, "fn"), (name_at, name)] = pair else {
            continue;
        };
        // `fn(u32) -> u32` is a type; a name follows the keyword and nothing but spaces.
        if code[start + 2..*name_at].trim() != "" {
            continue;
        }
        let Some(open) = bytes[*name_at..]
            .iter()
            .position(|b| *b == b'{' || *b == b';')
        else {
            continue;
        };
        let open = name_at + open;
        if bytes[open] == b'{' {
            let end = block_end(bytes, open);
            let lines = code[*start..end].matches('\n').count() + 1;
            found.push(Function {
                name: (*name).to_owned(),
                line: line_of(&code, *start),
                lines,
            });
        }
    }
    found
}

#[test]
fn literals_and_comments_are_not_code() {
    let text = r##"let a = "crate::x // {"; // crate::y
let b = r#"" crate::z"#; let c = '{'; let d: &'static str = b"\"{"; /* /* } */ fn e() */
let e = '\''; let r#type = '\u{7b}';"##;
    let code = code(text);
    assert!(
        !code.contains("crate") && !code.contains('{') && !code.contains('}'),
        "{code}"
    );
    assert!(
        code.contains("let d: &'static str") && code.contains("r#type"),
        "{code}"
    );
    assert!(comments(text).contains("crate::y") && !comments(text).contains("crate::z"));
    assert_eq!(code.matches('\n').count(), 2);
}

#[test]
fn test_modules_are_not_shipped() {
    let text = "use a::b;\n#[cfg(test)]\nmod tests {\n fn x() { { } }\n}\nuse c::d;\n";
    let shipped = shipped_code(text);
    assert!(shipped.contains("a::b") && shipped.contains("c::d") && !shipped.contains("tests"));
}

#[test]
fn functions_are_measured_from_keyword_to_brace() {
    let text =
        "fn a() {\n}\ntrait T { fn b(); }\nconst F: fn(u8) = |_| {};\nfn c<'a>(x: &'a str)\n{\n\n}";
    let found = functions(text);
    let sizes: Vec<(&str, usize, usize)> = found
        .iter()
        .map(|f| (f.name.as_str(), f.line, f.lines))
        .collect();
    assert_eq!(sizes, [("a", 1, 2), ("c", 5, 4)]);
}
