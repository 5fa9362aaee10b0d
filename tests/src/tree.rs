//! The workspace as text: Rust files without their tests and comments, and the lengths of their functions.

use std::path::{Path, PathBuf};

/// Root of the workspace.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the workspace").to_path_buf()
}

/// A Rust file of the workspace.
#[derive(Debug)]
pub struct Source {
    /// Path from the root, with forward slashes.
    pub path: String,
    /// Whole text.
    pub text: String,
}

impl Source {
    /// Tests, their support and build scripts do not ship.
    pub fn is_product(&self) -> bool {
        !self.path.starts_with("tests/")
            && !self.path.contains("/tests")
            && !self.path.ends_with("build.rs")
            && !self.path.contains("/examples/")
            && !self.path.contains("/benches/")
            && !self.path.ends_with("/testing.rs")
            && !self.path.contains("/testing/")
    }

    /// Lines before a trailing inline test module, comments blanked.
    pub fn product_lines(&self) -> Vec<&str> {
        let end = self.text.find("\n#[cfg(test)]\nmod tests {").unwrap_or(self.text.len());
        self.text[..end]
            .lines()
            .map(|line| if line.trim_start().starts_with("//") { "" } else { line })
            .collect()
    }

    /// Functions as (line, name, lines), measured from signature to the closing brace at the same indent.
    pub fn functions(&self) -> Vec<(usize, String, usize)> {
        let lines = self.product_lines();
        let mut found = Vec::new();
        for (at, line) in lines.iter().enumerate() {
            let Some(name) = function_name(line) else { continue };
            let indent = line.len() - line.trim_start().len();
            let close =
                |l: &&str| l.len() - l.trim_start().len() == indent && l.trim_start().starts_with('}');
            if line.trim_end().ends_with(';') || line.trim_end().ends_with('}') {
                continue;
            }
            if let Some(length) = lines[at + 1..].iter().position(close) {
                found.push((at + 1, name, length + 2));
            }
        }
        found
    }
}

fn function_name(line: &str) -> Option<String> {
    let mut words = line.trim_start();
    for prefix in ["pub(crate) ", "pub(super) ", "pub ", "const ", "async ", "unsafe "] {
        words = words.strip_prefix(prefix).unwrap_or(words);
    }
    let name: String =
        words.strip_prefix("fn ")?.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
    (!name.is_empty()).then_some(name)
}

/// Every Rust file of the workspace, sorted by path.
pub fn sources() -> Vec<Source> {
    let root = root();
    let mut files = Vec::new();
    for folder in ["proto", "kernels", "services", "tests"] {
        collect(&root.join(folder), &mut files);
    }
    files.sort();
    let read = |path: PathBuf| Source {
        path: path
            .strip_prefix(&root)
            .expect("collected below the root")
            .to_string_lossy()
            .replace('\\', "/"),
        text: std::fs::read_to_string(&path).expect("a source file is UTF-8"),
    };
    files.into_iter().map(read).collect()
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("a folder of the workspace").flatten() {
        let path = entry.path();
        if path.is_dir() && entry.file_name() != "target" {
            collect(&path, files);
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
}
