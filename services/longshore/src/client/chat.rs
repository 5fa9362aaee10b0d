//! `longshore chat`: a conversation. Every turn sends the whole conversation; the cluster's prefix cache makes that cheap.

use std::io::BufRead;

use anyhow::{Context, Result, bail};
use longshore_fabric::CallContext;
use longshore_proto::types::{ChatMessage, PromptChunk};

use super::stream;
use crate::{cli::ChatArgs, console};

/// Runs the command until end of input or `/quit`.
pub(crate) async fn chat(args: ChatArgs) -> Result<()> {
    let mut messages = Vec::new();
    if let Some(system) = &args.system {
        messages.push(message("system", system));
    }
    let mut answered = true;
    console::note("type a message, /new for a new conversation, /quit or Ctrl-D to leave");
    while let Some(line) = read_line().await? {
        match line.trim() {
            "" => continue,
            "/quit" | "/exit" => break,
            "/new" => messages.retain(|message| message.role == "system"),
            text if text.starts_with('/') && !text.contains(char::is_whitespace) => {
                console::note(format!("there is no `{text}`; /new begins anew, /quit leaves"));
            }
            text => answered = turn(&args, &mut messages, text).await,
        }
    }
    if !answered {
        bail!("the last question has no answer; why is told above");
    }
    Ok(())
}

/// One turn, and whether it has an answer; a failure is told and leaves the conversation as it was.
async fn turn(args: &ChatArgs, messages: &mut Vec<ChatMessage>, text: &str) -> bool {
    messages.push(message("user", text));
    let prompt = messages.iter().cloned().map(PromptChunk::Message).collect();
    let ctx = CallContext::new("");
    match stream::run(&args.url, stream::start(&args.sampling), prompt, &ctx).await {
        Ok(answer) => {
            messages.push(message("assistant", &answer.text));
            true
        }
        Err(error) => {
            messages.pop();
            console::fail(&error);
            false
        }
    }
}

fn message(role: &str, content: &str) -> ChatMessage {
    ChatMessage { role: role.to_owned(), content: content.to_owned() }
}

async fn read_line() -> Result<Option<String>> {
    console::piece("> ");
    let read = || {
        let mut line = String::new();
        std::io::stdin().lock().read_line(&mut line).map(|read| (read > 0).then_some(line))
    };
    let line = tokio::task::spawn_blocking(read).await.context("the input thread ended")?;
    line.context("cannot read standard input as UTF-8")
}
