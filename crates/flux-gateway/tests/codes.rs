//! The table of error codes in docs/API.md is the one in the code.

use flux_proto::Code;

const API: &str = include_str!("../../../docs/API.md");

/// `InvalidArgument` as gRPC's documents write it: `INVALID_ARGUMENT`.
fn grpc_name(code: Code) -> String {
    let mut name = String::new();
    for letter in format!("{:?}", code.grpc()).chars() {
        if letter.is_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.push(letter.to_ascii_uppercase());
    }
    name
}

#[test]
fn the_documented_table_is_the_code() {
    let section = API.split_once("\n## Error codes\n").expect("the section").1;
    let rows = section.lines().filter(|line| line.starts_with("| ") && line.contains('`'));
    let rows: Vec<&str> = rows.collect();
    assert_eq!(rows.len(), Code::ALL.len());
    for (row, &code) in rows.iter().zip(Code::ALL) {
        let expected = format!(
            "| {} | `{}` | `{}` | `{}` | {} | ",
            code.number(),
            code.name(),
            code.resp_prefix(),
            grpc_name(code),
            code.http(),
        );
        let meaning = row.strip_prefix(&expected);
        let explained = meaning.is_some_and(|text| text.len() > " |".len());
        assert!(explained, "docs/API.md has\n{row}\nwhere code.rs says\n{expected}");
    }
}
