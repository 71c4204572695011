//! The bugs that `tests/mutations/run` puts into the product still fit it. That script takes long and is run by hand; this is
//! what keeps its patches from rotting meanwhile.

use std::path::Path;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the workspace")
}

/// The pieces of a file that a patch wants to find, as they must stand there.
fn wanted(patch: &str) -> Vec<(String, String)> {
    let (mut file, mut pieces) = (String::new(), Vec::<(String, String)>::new());
    let mut inside = false;
    for line in patch.lines() {
        if let Some(name) = line.strip_prefix("+++ b/") {
            name.clone_into(&mut file);
        } else if line.starts_with("@@ ") {
            inside = true;
            pieces.push((file.clone(), String::new()));
        } else if line.starts_with("diff ") || line.starts_with("--- ") {
            inside = false;
        } else if inside
            && let Some((_, text)) = pieces.last_mut()
            && let Some(old) = line.strip_prefix([' ', '-'])
        {
            text.push_str(old);
            text.push('\n');
        }
    }
    pieces
}

#[test]
fn every_mutation_fits_the_product_as_it_is() {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(root().join("tests/mutations")).expect("mutations") {
        let path = entry.expect("an entry").path();
        if path.extension().is_none_or(|ending| ending != "patch") {
            continue;
        }
        let name = path
            .file_stem()
            .expect("a name")
            .to_string_lossy()
            .into_owned();
        let patch = std::fs::read_to_string(&path).expect("a text");
        let pieces = wanted(&patch);
        assert!(!pieces.is_empty(), "{name} changes nothing");
        for (file, text) in pieces {
            let found = std::fs::read_to_string(root().join(&file))
                .unwrap_or_else(|error| panic!("{name}: {file}: {error}"));
            let times = found.matches(&text).count();
            assert_eq!(times, 1, "{name}: in {file} there is no place like\n{text}");
        }
        names.push(name);
    }
    names.sort();
    assert_eq!(
        names,
        [
            "ack-one-more",
            "ack-too-early",
            "count-rounds-twice",
            "forget-give-back",
            "forget-the-next-attempt",
            "keep-too-long",
            "land-damaged-pages",
            "lose-the-fence",
            "resume-after-commit",
            "reuse-chunk-index",
            "skip-give-back",
            "trust-every-prepared",
            "wait-longer-for-running",
        ]
    );
}
