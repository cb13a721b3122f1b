#!/usr/bin/env bash
# Train a T5 target of 14 M parameters on translation and summary prompts, and a drafter for each task.
#
#   PACELINE_DATA=FOLDER scripts/train_t5_models.sh OUT             all of it; the same command continues
#   TRIAL=1 PACELINE_DATA=FOLDER scripts/train_t5_models.sh OUT     some 20 steps of each, to see it run
#
# FOLDER has translation.jsonl and summary.jsonl (docs/data.md), of which only the part `training` is used:
# 1.04 M tokens of prompts and 0.85 M of references per pass.
#
# target: 4 encoder and 4 decoder layers, d_model 320, 5 heads of 64, gated d_ff 832, one embedding of
#   8,192 tokens for both and for the output: 13.9 M parameters. Its prompts have no chat template, as
#   T5's. transformers' `generate` needs at least as many encoder as decoder layers.
# drafters: 2 encoder layers and 1 decoder layer, d_model 128, 4 heads of 32, d_ff 256: 1.6 M, of which
#   the embedding has 1.05 M. The encoder runs once per request, so a drafted token costs one layer.
#
# A pass over the pairs has some 1,170 steps of at most 2,048 padded tokens. A step of the target needs 1.2
# to 1.4 s of CPU time in float32 (Xeon at 2.8 GHz, one thread), so a pass about 25 minutes on a core that
# has nothing else to do. THREADS=2 is slower where other programs use the cores: torch's threads wait for
# each other (190 instead of 890 tokens per second, two busy cores).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=$(mkdir -p "${1:?name a folder to write}" && cd "$1" && pwd)
data=${PACELINE_DATA:?name the folder with translation.jsonl and summary.jsonl}
run=("${PYTHON:-python3}" -m paceline)
common=(--threads "${THREADS:-1}" --set events=null)

target_epochs=8 drafter_epochs=6
if [[ -n ${TRIAL:-} ]]; then
    target_epochs=0.6 drafter_epochs=1
    common+=(--set 'max_prompts={"translation": 200, "summary": 200}' --set batch_tokens=512)
else
    common+=(--set batch_tokens=2048)
fi

"${run[@]}" pretrain "$data/translation.jsonl" "$data/summary.jsonl" \
    --out "$out/target" --tokenizer zoo/target --epochs "$target_epochs" "${common[@]}" \
    --set 'shape={"num_layers": 4, "num_encoder_layers": 4, "hidden_size": 320, "mlp_size": 832, "num_heads": 5}' \
    --set chat_template=false --set context=512 --set learning_rate=0.002

cat > "$out/paceline.yaml" <<YAML
target: {model: $out/target}
drafters:
  translation: {kind: draft_model, settings: {model: $out/draft-translation, num_draft_tokens: 5}}
  summary: {kind: draft_model, settings: {model: $out/draft-summary, num_draft_tokens: 5}}
YAML

if [[ -n ${TRIAL:-} ]]; then
    common=(--threads "${THREADS:-1}" --set events=null --set max_prompts=60 --set batch_tokens=512
        --set max_new_tokens=24)
fi
for task in translation summary; do
    "${run[@]}" distill "$data/$task.jsonl" --config "$out/paceline.yaml" --out "$out/draft-$task" \
        --epochs "$drafter_epochs" "${common[@]}" --set loss=kl --set learning_rate=0.003 \
        --set "outputs=$out/outputs"
done
