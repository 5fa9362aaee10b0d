//! What a server takes of this machine: addresses and a folder. Whether it would get them.

use std::path::Path;

use longshore_chassis::reserve;
use tokio::runtime::Handle;

use super::findings::Problem;
use crate::config::Config;

/// Appends each address that cannot be listened on, and that the folder of blocks cannot be written to. Blocks on a worker thread of a
/// runtime.
pub(super) fn look(config: &Config, problems: &mut Vec<Problem>) {
    let listen = &config.listen;
    for (key, flag, address) in [
        ("listen.http", "--http", &listen.http),
        ("listen.grpc", "--grpc", &listen.grpc),
        ("listen.admin", "--admin", &listen.admin),
    ] {
        if let Some(error) =
            (!address.is_empty()).then(|| Handle::current().block_on(reserve(address)).err()).flatten()
        {
            let told = error.to_string();
            let (problem, remedy) = told.split_once(", hint: ").unwrap_or((&told, "choose another address"));
            problems.push(Problem::new(format!("`{key}` ({flag}): {problem}"), remedy));
        }
    }
    if let Err(error) = listen.check_distinct(true) {
        let told = error.to_string();
        let (problem, remedy) = told.split_once("; hint: ").unwrap_or((&told, "give each its own"));
        problems.push(Problem::new(problem, remedy));
    }
    look_at_disk(&config.kvstore.disk.path, problems);
}

/// The folder is made at the first start, so what counts is the nearest one that there is.
fn look_at_disk(path: &str, problems: &mut Vec<Problem>) {
    let path = Path::new(path);
    let nearest = path.ancestors().find(|folder| folder.exists()).unwrap_or(path);
    let nearest = if nearest.as_os_str().is_empty() { Path::new(".") } else { nearest };
    if !path.as_os_str().is_empty()
        && let Err(error) = tempfile::tempfile_in(nearest)
    {
        problems.push(Problem::new(
            format!("`kvstore.disk.path` (--disk): cannot write to `{}`: {error}", nearest.display()),
            "choose a folder that this user may write to",
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(config: &Config) -> Vec<String> {
        let mut problems = Vec::new();
        look(config, &mut problems);
        assert!(problems.iter().all(|problem| !problem.remedy.is_empty()), "{problems:?}");
        problems.into_iter().map(|problem| problem.problem).collect()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn taken_addresses_and_hopeless_folders_are_problems() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let taken = listener.local_addr().unwrap().to_string();
        let mut config = Config::default();
        (config.listen.http, config.listen.grpc) = (String::new(), "127.0.0.1:0".to_owned());
        let folder = tempfile::tempdir().unwrap();
        config.kvstore.disk.path = folder.path().join("not/yet").display().to_string();
        let (fine, mut config) = (config.clone(), config);
        config.listen.grpc = taken.clone();
        config.listen.admin = taken.clone();
        let file = folder.path().join("file");
        std::fs::write(&file, "").unwrap();
        config.kvstore.disk.path = file.join("below").display().to_string();
        let (fine, ill) = tokio::task::spawn_blocking(move || (told(&fine), told(&config))).await.unwrap();
        assert_eq!(fine, Vec::<String>::new());
        let [grpc, admin, both, disk] = &ill[..] else { panic!("four problems: {ill:?}") };
        assert!(grpc.starts_with("`listen.grpc` (--grpc): ") && grpc.contains(&taken), "{grpc}");
        assert!(admin.starts_with("`listen.admin` (--admin): "), "{admin}");
        assert!(both.contains("`listen.admin`") && both.contains("taken by `listen.grpc`"), "{both}");
        assert!(disk.starts_with("`kvstore.disk.path` (--disk): "), "{disk}");
    }
}
