#!/usr/bin/env bash
# The studies of notebook 4. `study.sh` makes all of them (many hours on two CPU cores), `study.sh vit-clean` one. Each can be
# stopped, and goes on where it was. In runs/study/NAME are the tables and pictures; its runs.csv is NAME.csv here.
set -euo pipefail
export OMP_NUM_THREADS=1 # as all of them were made: with more, sums have other last bits, and runs another course

made=
study() {
  local name=$1
  shift
  if [[ ${ONLY:-$name} == "$name" ]]; then
    made=yes
    hf-aace compare --output_dir "runs/study/$name" "$@"
  fi
}

# What `hf-aace find-rho` advises in some of them; find-rho.json here holds the find_rho.json of each.
find_rho() {
  local name=find-rho-$1
  shift
  if [[ ${ONLY:-$name} == "$name" ]]; then
    made=yes
    hf-aace find-rho --output_dir "runs/study/$name" "$@"
  fi
}

ONLY=${1:-}
noisy="--label_noise 0.2 --train_size 400 --num_train_epochs 40"
study convnext-noisy $noisy --seeds 16 --methods \
  'trainer,sam:rho=0.05|0.1|0.2|0.5|1,aace:rho=0.01|0.03|0.1|0.3|1,aace:ascent_fraction=0.125:rho=0.03|0.1|0.3|1'
further='trainer,trainer:learning_rate=1e-3|3e-3|1e-2:weight_decay=0|0.1,trainer:num_train_epochs=80'
further+=',trainer:label_smoothing_factor=0.1,asam:rho=0.5|1|2|5|10,aace,aace:label_smoothing_factor=0.1:rho=0.03|0.1|0.3'
further+=',aace:ascent_fraction=0.25:rho=0.03|0.1|0.3,aace:ascent_fraction=0.0625:rho=0.03|0.1|0.3|1'
further+=',aace:aace_target=uniform:rho=0.03|0.1|0.3,aace:aace_target=random:rho=0.03|0.1|0.3'
further+=',aace:normalize_perturbation=true:rho=0.05|0.1|0.2|0.5|1|2,aace:adaptive_perturbation=true:rho=3|10|30'
study convnext-noisy-more $noisy --seeds 8 --methods "$further"
study convnext-noisy-tuned $noisy --seeds 16 --baseline 'trainer:learning_rate=1e-4|3e-4|1e-3|3e-3|1e-2' --methods \
  'trainer:learning_rate=1e-4|3e-4|1e-3|3e-3|1e-2,trainer:learning_rate=3e-4:num_train_epochs=80,sam:learning_rate=3e-4|1e-3|3e-3|1e-2:rho=0.1|0.2|0.5|1,aace:learning_rate=3e-4|1e-3|3e-3|1e-2:rho=0.1|0.3|1'
find_rho convnext-noisy $noisy
find_rho convnext-noisy-1e-3 $noisy --learning_rate 1e-3
study found-convnext-noisy $noisy --learning_rate 1e-3 --seeds 8 --methods trainer,aace:rho=0.1
study convnext-noisier --label_noise 0.4 --train_size 400 --num_train_epochs 40 --seeds 8 --methods \
  'trainer,trainer:num_train_epochs=80,sam:rho=0.2|0.5|1,aace,aace:rho=0.1|0.3|1,aace:ascent_fraction=0.125:rho=0.1|0.3'
study convnext-noisier-tuned --label_noise 0.4 --train_size 400 --num_train_epochs 40 --seeds 8 --search_seeds 4 \
  --baseline 'trainer:learning_rate=1e-4|3e-4|1e-3|3e-3' --methods \
  'trainer:learning_rate=1e-4|3e-4|1e-3|3e-3,trainer:learning_rate=3e-4:num_train_epochs=80,sam:learning_rate=3e-4|1e-3|3e-3:rho=0.1|0.2|0.5|1,aace:learning_rate=3e-4|1e-3|3e-3:rho=0.1|0.3|1|3'
study convnext-clean --train_size 200 --num_train_epochs 60 --seeds 8 --methods \
  'trainer,trainer:num_train_epochs=120,sam:rho=0.05|0.1|0.2|0.5,aace,aace:rho=0.01|0.03|0.1|0.3,aace:ascent_fraction=0.125:rho=0.01|0.03|0.1'
study convnext-clean-tuned --train_size 200 --num_train_epochs 60 --seeds 8 --baseline 'trainer:learning_rate=3e-4|1e-3|3e-3|1e-2' --methods \
  'trainer:learning_rate=3e-4|1e-3|3e-3|1e-2,trainer:num_train_epochs=120,sam:learning_rate=1e-3|3e-3|1e-2:rho=0.05|0.1|0.2|0.5|1,aace:learning_rate=1e-3|3e-3|1e-2:rho=0.01|0.03|0.1|0.3,aace'
find_rho convnext-clean --train_size 200 --num_train_epochs 60
methods='trainer,trainer:learning_rate=1e-3|3e-3,sam:rho=0.05|0.2|0.5,aace,aace:rho=0.03|0.1|0.3,aace:ascent_fraction=0.125:rho=0.03|0.1|0.3'
study convnext-noisy-all --label_noise 0.2 --num_train_epochs 30 --seeds 8 --search_seeds 2 --methods "$methods"
study convnext-noisy-all-tuned --label_noise 0.2 --num_train_epochs 30 --seeds 8 --search_seeds 4 \
  --baseline 'trainer:learning_rate=1e-4|3e-4|1e-3|3e-3' --methods \
  'trainer:learning_rate=1e-4|3e-4|1e-3|3e-3,trainer:learning_rate=3e-4:num_train_epochs=60,sam:learning_rate=3e-4|1e-3|3e-3:rho=0.2|0.5|1,aace:learning_rate=3e-4|1e-3|3e-3:rho=0.1|0.3|1'
study convnext-clean-all --num_train_epochs 20 --seeds 8 --search_seeds 2 --methods "$methods,trainer:num_train_epochs=40"
find_rho convnext-clean-all --num_train_epochs 20

resnet="--model_name_or_path resnet-tiny-digits --learning_rate 3e-3 --num_train_epochs 40 --seeds 8 --search_seeds 2"
methods='trainer,trainer:learning_rate=3e-4|1e-3|3e-3|1e-2,trainer:num_train_epochs=80,sam:rho=0.05|0.1|0.2|0.5,aace,aace:rho=0.03|0.1|0.3|1,aace:ascent_fraction=0.25:rho=0.03|0.1|0.3'
study resnet-noisy $resnet --label_noise 0.2 --train_size 400 --methods "$methods"
study resnet-noisy-tuned $resnet --search_seeds 4 --label_noise 0.2 --train_size 400 --baseline 'trainer:learning_rate=1e-4|3e-4|1e-3|3e-3|1e-2' --methods \
  'trainer:learning_rate=1e-4|3e-4|1e-3|3e-3|1e-2,trainer:learning_rate=3e-4:num_train_epochs=80,sam:learning_rate=3e-4|1e-3|3e-3:rho=0.2|0.5|1|2,aace:learning_rate=3e-4|1e-3|3e-3:rho=0.3|1|3'
study resnet-clean $resnet --train_size 200 --methods "$methods"
resnet="--model_name_or_path resnet-tiny-digits --num_train_epochs 40"
find_rho resnet-noisy $resnet --label_noise 0.2 --train_size 400 --learning_rate 1e-3
study found-resnet-noisy $resnet --label_noise 0.2 --train_size 400 --learning_rate 1e-3 --seeds 8 --methods trainer,aace:rho=0.3
find_rho resnet-clean $resnet --train_size 200 --learning_rate 3e-3

vit="--model_name_or_path vit-tiny-digits --seeds 8 --search_seeds 2"
noisy="--label_noise 0.2 --train_size 600"
study vit-noisy $vit $noisy --num_train_epochs 80 --baseline 'trainer:learning_rate=3e-4|1e-3|3e-3' --methods \
  'trainer:learning_rate=3e-4|1e-3|3e-3,trainer:learning_rate=1e-3,sam:learning_rate=3e-4|1e-3:rho=0.05|0.1|0.2,aace:learning_rate=3e-4,aace:learning_rate=3e-4|1e-3:rho=0.03|0.1|0.3,aace:ascent_fraction=0.125:learning_rate=3e-4:rho=0.01|0.03|0.1'
find_rho vit-noisy --model_name_or_path vit-tiny-digits $noisy --num_train_epochs 80 --learning_rate 3e-4
study vit-noisy-tuned $vit --search_seeds 4 $noisy --seeds 16 --num_train_epochs 80 --baseline 'trainer:learning_rate=3e-5|1e-4|3e-4|1e-3|3e-3' --methods \
  'trainer:learning_rate=3e-5|1e-4|3e-4|1e-3|3e-3,trainer:learning_rate=1e-4:num_train_epochs=160,sam:learning_rate=1e-4|3e-4|1e-3:rho=0.005|0.01|0.02|0.05|0.1,aace:learning_rate=1e-4|3e-4|1e-3:rho=0.001|0.003|0.01|0.03|0.1,trainer:learning_rate=1e-4:label_smoothing_factor=0.1'
study vit-noisier-tuned $vit --search_seeds 4 --label_noise 0.4 --train_size 600 --num_train_epochs 80 --baseline 'trainer:learning_rate=3e-5|1e-4|3e-4' --methods \
  'trainer:learning_rate=3e-5|1e-4|3e-4,trainer:learning_rate=1e-4:num_train_epochs=160,sam:learning_rate=1e-4|3e-4:rho=0.01|0.02|0.05|0.1,aace:learning_rate=1e-4|3e-4:rho=0.003|0.01|0.03|0.1'
study vit-noisy-all-tuned $vit --search_seeds 4 --label_noise 0.2 --num_train_epochs 30 --baseline 'trainer:learning_rate=1e-4|3e-4|1e-3' --methods \
  'trainer:learning_rate=1e-4|3e-4|1e-3,trainer:learning_rate=3e-4:num_train_epochs=60,sam:learning_rate=3e-4|1e-3:rho=0.01|0.02|0.05|0.1,aace:learning_rate=3e-4|1e-3:rho=0.003|0.01|0.03|0.1'
study vit-noisier $vit --label_noise 0.4 --train_size 600 --num_train_epochs 80 --baseline 'trainer:learning_rate=1e-4|3e-4|1e-3' --methods \
  'trainer:learning_rate=1e-4|3e-4|1e-3,sam:learning_rate=3e-4|1e-3:rho=0.05|0.1|0.2,aace:learning_rate=3e-4,aace:learning_rate=3e-4|1e-3:rho=0.01|0.03|0.1|0.3'
find_rho vit-noisy-all --model_name_or_path vit-tiny-digits --label_noise 0.2 --num_train_epochs 30 --learning_rate 3e-4
study vit-noisy-short $vit $noisy --num_train_epochs 40 --learning_rate 1e-3 --methods \
  'trainer,aace,aace:rho=0.03|0.1|0.3,sam:rho=0.05|0.1|0.2,aace:ascent_fraction=0.125:rho=0.01|0.03|0.1,aace:ascent_fraction=0.0625:rho=0.01|0.03|0.1,trainer:num_train_epochs=80'
study vit-clean $vit --train_size 300 --num_train_epochs 80 --learning_rate 1e-3 --methods \
  'trainer,aace,aace:rho=0.03|0.1|0.3,sam:rho=0.05|0.1|0.2,aace:ascent_fraction=0.125:rho=0.03|0.1,trainer:num_train_epochs=160'
find_rho vit-clean --model_name_or_path vit-tiny-digits --train_size 300 --num_train_epochs 80 --learning_rate 1e-3
study vit-clean-rates $vit --train_size 300 --num_train_epochs 80 --learning_rate 1e-3 --methods \
  'trainer,trainer:learning_rate=3e-4|1e-3|3e-3,trainer:num_train_epochs=160:learning_rate=3e-4|1e-3,sam:learning_rate=3e-4|1e-3:rho=0.01|0.02|0.05,aace,aace:learning_rate=3e-4|1e-3|3e-3:rho=0.001|0.003|0.01'
study vit-clean-long $vit --train_size 300 --num_train_epochs 160 --learning_rate 1e-3 --baseline 'trainer:learning_rate=1e-4|3e-4|1e-3' --methods \
  'trainer:learning_rate=1e-4|3e-4|1e-3,trainer:learning_rate=3e-4:num_train_epochs=320,aace:learning_rate=3e-4:rho=0|0.001|0.003|0.01,aace:learning_rate=3e-4,sam:learning_rate=3e-4:rho=0.005|0.01|0.02'
study vit-clean-long-tuned $vit --search_seeds 4 --train_size 300 --num_train_epochs 160 --methods \
  'sam:learning_rate=1e-4|3e-4|1e-3:rho=0.005|0.01|0.02,aace:learning_rate=1e-4|3e-4|1e-3:rho=0.001|0.003|0.01'
find_rho vit-clean-long --model_name_or_path vit-tiny-digits --train_size 300 --num_train_epochs 160 --learning_rate 3e-4

# Fine-tuning: from the digits 0 to 5 to the digits 6 to 9.
if [[ -z $ONLY || $ONLY == *finetune* ]]; then
  python "$(dirname "$0")/make_tasks.py"
  pretrain="hf-aace train --rho 0 --dataset_name runs/study/digits-0-5 --augmentation none --save_strategy no"
  $pretrain --output_dir runs/study/pretrained-convnext
  $pretrain --model_name_or_path vit-tiny-digits --output_dir runs/study/pretrained-vit
  sha256sum --check --quiet "$(dirname "$0")/pretrained.sha256" >&2 ||
    echo "Pre-trained on another processor, say, these models are others: compare fine-tuning with their own runs only." >&2
fi
tuning="--dataset_name runs/study/digits-6-9 --augmentation none --num_train_epochs 40 --learning_rate 1e-3 --seeds 8"
methods='trainer,trainer:learning_rate=3e-4|1e-3|3e-3,trainer:num_train_epochs=80,sam:rho=0.05|0.1|0.2|0.5,aace,aace:rho=0.03|0.1|0.3|1,aace:ascent_fraction=0.25:rho=0.03|0.1|0.3'
study finetune-convnext-noisy --model_name_or_path runs/study/pretrained-convnext $tuning --train_size 100 --label_noise 0.2 \
  --methods "$methods"
study finetune-vit-lora-noisy --model_name_or_path runs/study/pretrained-vit $tuning --lora true --train_size 100 \
  --label_noise 0.2 --methods "$methods"
study finetune-convnext-clean --model_name_or_path runs/study/pretrained-convnext $tuning --train_size 50 --methods \
  'trainer,trainer:learning_rate=3e-4|1e-3|3e-3,sam:rho=0.05|0.1|0.2,aace,aace:rho=0.03|0.1|0.3'
study finetune-convnext-noisy-tuned --model_name_or_path runs/study/pretrained-convnext $tuning --train_size 100 --label_noise 0.2 \
  --baseline 'trainer:learning_rate=1e-4|3e-4|1e-3|3e-3' --methods \
  'trainer:learning_rate=1e-4|3e-4|1e-3|3e-3,trainer:learning_rate=3e-4:num_train_epochs=80,sam:learning_rate=3e-4|1e-3|3e-3:rho=0.05|0.1|0.2|0.5|1,aace:learning_rate=3e-4|1e-3|3e-3:rho=0.03|0.1|0.3|1'
study finetune-vit-lora-clean --model_name_or_path runs/study/pretrained-vit $tuning --lora true --train_size 50 --methods \
  'trainer,trainer:learning_rate=3e-4|1e-3|3e-3,sam:rho=0.05|0.1|0.2,aace,aace:rho=0.03|0.1|0.3'
study finetune-convnext-clean-tuned --model_name_or_path runs/study/pretrained-convnext $tuning --train_size 50 \
  --baseline 'trainer:learning_rate=3e-4|1e-3|3e-3|1e-2' --methods \
  'trainer:learning_rate=3e-4|1e-3|3e-3|1e-2,trainer:learning_rate=3e-3:num_train_epochs=80,sam:learning_rate=1e-3|3e-3|1e-2:rho=0.05|0.1|0.2,aace:learning_rate=1e-3|3e-3|1e-2:rho=0.003|0.01|0.03|0.1,aace:learning_rate=3e-3'
study finetune-vit-lora-noisy-tuned --model_name_or_path runs/study/pretrained-vit $tuning --seeds 16 --lora true --train_size 100 --label_noise 0.2 \
  --baseline 'trainer:learning_rate=1e-3|3e-3|1e-2|3e-2' --methods \
  'trainer:learning_rate=1e-3|3e-3|1e-2|3e-2,trainer:learning_rate=3e-3:num_train_epochs=80,trainer:learning_rate=1e-2:num_train_epochs=80,sam:learning_rate=1e-3|3e-3|1e-2|3e-2:rho=0.02|0.05|0.1|0.2,aace:learning_rate=1e-3|3e-3|1e-2|3e-2:rho=0.003|0.01|0.03|0.1'
study finetune-vit-lora-clean-tuned --model_name_or_path runs/study/pretrained-vit $tuning --seeds 16 --lora true --train_size 50 \
  --baseline 'trainer:learning_rate=1e-3|3e-3|1e-2|3e-2' --methods \
  'trainer:learning_rate=1e-3|3e-3|1e-2|3e-2,trainer:learning_rate=1e-2:num_train_epochs=80,sam:learning_rate=1e-3|3e-3|1e-2|3e-2:rho=0.005|0.01|0.02|0.05|0.1,aace:learning_rate=1e-3|3e-3|1e-2|3e-2:rho=0.003|0.01|0.03|0.1,aace:learning_rate=3e-3,aace:learning_rate=1e-2'
find_rho finetune-convnext-noisy --model_name_or_path runs/study/pretrained-convnext $tuning --seeds 3 --train_size 100 --label_noise 0.2
find_rho finetune-convnext-clean --model_name_or_path runs/study/pretrained-convnext $tuning --seeds 3 --train_size 50
find_rho finetune-vit-lora-clean --model_name_or_path runs/study/pretrained-vit $tuning --seeds 3 --lora true --train_size 50

# AACE's step scaled by the squared weights, at one rho, 10, and any learning rate; in three also at others, beside ASAM.
searched() {
  local name=$1 methods=$2
  shift 2
  study "$name" --methods "$methods" --seeds 8 --search_seeds 4 "$@"
}
step=adaptive_perturbation=true
resnet="--model_name_or_path resnet-tiny-digits --num_train_epochs 40"
vit="--model_name_or_path vit-tiny-digits"
tuning="--dataset_name runs/study/digits-6-9 --augmentation none --num_train_epochs 40 --learning_rate 1e-3"
convnext_tuning="--model_name_or_path runs/study/pretrained-convnext $tuning"
lora_tuning="--model_name_or_path runs/study/pretrained-vit $tuning --lora true"
searched convnext-noisy-scaled "aace:learning_rate=3e-4|1e-3|3e-3|1e-2:$step:rho=3|10|30,asam:learning_rate=3e-4|1e-3|3e-3|1e-2:rho=0.5|1|2|5|10|20" \
  --label_noise 0.2 --train_size 400 --num_train_epochs 40 --seeds 16
searched convnext-noisier-scaled "aace:learning_rate=3e-4|1e-3|3e-3:$step:rho=10,aace:learning_rate=3e-4|1e-3|3e-3:$step:rho=30|100,asam:learning_rate=3e-4|1e-3|3e-3:rho=0.5|1|2|5|10|20" \
  --label_noise 0.4 --train_size 400 --num_train_epochs 40
searched convnext-noisy-all-scaled "aace:learning_rate=1e-3|3e-3|1e-2:$step:rho=10" --label_noise 0.2 --num_train_epochs 30
searched convnext-clean-scaled "aace:learning_rate=1e-3|3e-3|1e-2:$step:rho=10" --train_size 200 --num_train_epochs 60
searched convnext-clean-all-scaled "aace:learning_rate=3e-4|1e-3|3e-3:$step:rho=10" --num_train_epochs 20
searched resnet-noisy-scaled "aace:learning_rate=3e-4|1e-3|3e-3|1e-2:$step:rho=10" $resnet --label_noise 0.2 --train_size 400
searched resnet-clean-scaled "aace:learning_rate=1e-3|3e-3|1e-2:$step:rho=10" $resnet --train_size 200
searched vit-noisy-scaled "aace:learning_rate=1e-4|3e-4|1e-3:$step:rho=3|10|30,asam:learning_rate=1e-4|3e-4|1e-3:rho=0.05|0.1|0.2|0.5|1|2|5|10" \
  $vit --label_noise 0.2 --train_size 600 --num_train_epochs 80 --seeds 16
searched vit-noisier-scaled "aace:learning_rate=1e-4|3e-4|1e-3:$step:rho=10" $vit --label_noise 0.4 --train_size 600 --num_train_epochs 80
searched vit-noisy-all-scaled "aace:learning_rate=3e-4|1e-3|3e-3:$step:rho=10" $vit --label_noise 0.2 --num_train_epochs 30
searched vit-clean-long-scaled "aace:learning_rate=1e-4|3e-4|1e-3:$step:rho=10" $vit --train_size 300 --num_train_epochs 160
searched finetune-convnext-noisy-scaled "aace:learning_rate=3e-4|1e-3|3e-3:$step:rho=10" $convnext_tuning --train_size 100 --label_noise 0.2
searched finetune-convnext-clean-scaled "aace:learning_rate=1e-3|3e-3|1e-2:$step:rho=10" $convnext_tuning --train_size 50
searched finetune-vit-lora-noisy-scaled "aace:learning_rate=3e-3|1e-2|3e-2:$step:rho=10" $lora_tuning --train_size 100 --label_noise 0.2 --seeds 16
searched finetune-vit-lora-clean-scaled "aace:learning_rate=3e-3|1e-2|3e-2:$step:rho=10" $lora_tuning --train_size 50 --seeds 16

# ASAM, SAM's step scaled so, where it is not beside AACE's above.
searched resnet-noisy-asam "asam:learning_rate=3e-4|1e-3|3e-3:rho=0.5|1|2|5|10" $resnet --label_noise 0.2 --train_size 400
searched finetune-convnext-noisy-asam "asam:learning_rate=3e-4|1e-3|3e-3:rho=0.5|1|2|5|10" $convnext_tuning --train_size 100 --label_noise 0.2
searched finetune-convnext-clean-asam "asam:learning_rate=1e-3|3e-3|1e-2:rho=0.1|0.2|0.5|1|2" $convnext_tuning --train_size 50
searched convnext-clean-asam "asam:learning_rate=1e-3|3e-3|1e-2:rho=0.2|0.5|1|2|5" --train_size 200 --num_train_epochs 60
searched vit-noisier-asam "asam:learning_rate=1e-4|3e-4:rho=0.1|0.2|0.5|1|2" $vit --label_noise 0.4 --train_size 600 --num_train_epochs 80
searched convnext-noisy-all-asam "asam:learning_rate=3e-4|1e-3|3e-3:rho=1|2|5|10" --label_noise 0.2 --num_train_epochs 30
searched vit-noisy-all-asam "asam:learning_rate=3e-4|1e-3:rho=0.1|0.2|0.5|1" $vit --label_noise 0.2 --num_train_epochs 30
searched vit-clean-long-asam "asam:learning_rate=1e-4|3e-4:rho=0.05|0.1|0.2|0.5" $vit --train_size 300 --num_train_epochs 160
searched finetune-vit-lora-noisy-asam "asam:learning_rate=3e-3|1e-2|3e-2:rho=0.2|0.5|1|2" $lora_tuning --train_size 100 --label_noise 0.2 --seeds 16
searched finetune-vit-lora-clean-asam "asam:learning_rate=3e-3|1e-2|3e-2:rho=0.1|0.2|0.5|1" $lora_tuning --train_size 50 --seeds 16

# AACE's step on the normalisation layers alone: on the noisy ConvNeXt and ViT by the whole batch and by parts of it, beside SAM's;
# and by a quarter in the others, at two values of rho, as in those two.
on=perturb_modules=norm
parts() {
  echo "$1:ascent_fraction=0.25,$1:ascent_fraction=0.125,$1:ascent_fraction=0.5:ascent_every=4"
}
quarter() {
  echo "aace:learning_rate=$1:$on:ascent_fraction=0.25:rho=30,aace:learning_rate=$1:$on:ascent_fraction=0.25:rho=10"
}
noisy="--label_noise 0.2 --train_size 400 --num_train_epochs 40 --seeds 16"
searched convnext-noisy-norm "aace:learning_rate=1e-3|3e-3|1e-2:$on:rho=10|30|100|300" $noisy
searched convnext-noisy-norm-parts "$(parts "aace:learning_rate=1e-3:$on:rho=10|30")" $noisy
searched convnext-noisy-norm-rates "$(quarter '3e-4|1e-3|3e-3|1e-2')" $noisy
searched convnext-noisy-norm-sam "sam:learning_rate=1e-3|3e-3:$on:rho=1|2|5|10|20" $noisy
noisy="$vit --label_noise 0.2 --train_size 600 --num_train_epochs 80 --seeds 16"
searched vit-noisy-norm "aace:learning_rate=3e-4:$on:rho=3|10|30|100" $noisy
searched vit-noisy-norm-parts "$(parts "aace:learning_rate=3e-4:$on:rho=10|30")" $noisy
searched vit-noisy-norm-rates "$(quarter '1e-4|3e-4|1e-3')" $noisy
searched vit-noisy-norm-sam "sam:learning_rate=1e-4|3e-4:$on:rho=0.1|0.3|1|3|10|30" $noisy
searched convnext-noisy-norm-scaled "aace:learning_rate=1e-3:$on:$step:ascent_fraction=0.25:rho=10|30|100" \
  --label_noise 0.2 --train_size 400 --num_train_epochs 40
searched convnext-noisier-norm-sam "sam:learning_rate=3e-4|1e-3|3e-3:$on:rho=1|2|5|10|20" --label_noise 0.4 --train_size 400 --num_train_epochs 40
searched resnet-noisy-norm-sam "sam:learning_rate=3e-4|1e-3|3e-3:$on:rho=1|3|10|30" $resnet --label_noise 0.2 --train_size 400
searched vit-noisier-norm-sam "sam:learning_rate=1e-4|3e-4:$on:rho=1|3|10|30" $vit --label_noise 0.4 --train_size 600 --num_train_epochs 80
searched convnext-noisier-norm "$(quarter '3e-4|1e-3|3e-3'),aace:learning_rate=3e-4|1e-3|3e-3:$on:ascent_fraction=0.25:rho=100" --label_noise 0.4 --train_size 400 --num_train_epochs 40
searched convnext-noisy-all-norm "$(quarter '1e-3|3e-3')" --label_noise 0.2 --num_train_epochs 30
searched convnext-clean-norm "$(quarter '1e-3|3e-3|1e-2')" --train_size 200 --num_train_epochs 60
searched convnext-clean-all-norm "$(quarter '1e-3|3e-3')" --num_train_epochs 20
searched resnet-noisy-norm "$(quarter '3e-4|1e-3|3e-3|1e-2')" $resnet --label_noise 0.2 --train_size 400
searched vit-noisier-norm "$(quarter '1e-4|3e-4')" $vit --label_noise 0.4 --train_size 600 --num_train_epochs 80
searched vit-noisy-all-norm "$(quarter '3e-4|1e-3')" $vit --label_noise 0.2 --num_train_epochs 30
searched vit-clean-long-norm "$(quarter '3e-4|1e-3')" $vit --train_size 300 --num_train_epochs 160
searched finetune-convnext-noisy-norm "$(quarter '3e-4|1e-3|3e-3')" $convnext_tuning --train_size 100 --label_noise 0.2
searched finetune-convnext-clean-norm "$(quarter '1e-3|3e-3|1e-2')" $convnext_tuning --train_size 50

# What plain training reaches on the same images if all labels are right: about the most that can be won where some are wrong.
searched convnext-noisy-right "trainer:learning_rate=3e-4|1e-3|3e-3|1e-2" --train_size 400 --num_train_epochs 40
searched convnext-noisy-all-right "trainer:learning_rate=3e-4|1e-3|3e-3|1e-2" --num_train_epochs 30
searched resnet-noisy-right "trainer:learning_rate=3e-4|1e-3|3e-3|1e-2" $resnet --train_size 400
searched vit-noisy-right "trainer:learning_rate=1e-4|3e-4|1e-3|3e-3" $vit --train_size 600 --num_train_epochs 80
searched vit-noisy-all-right "trainer:learning_rate=1e-4|3e-4|1e-3|3e-3" $vit --num_train_epochs 30
searched finetune-convnext-noisy-right "trainer:learning_rate=3e-4|1e-3|3e-3|1e-2" $convnext_tuning --train_size 100
searched finetune-vit-lora-noisy-right "trainer:learning_rate=1e-3|3e-3|1e-2|3e-2" $lora_tuning --train_size 100 --seeds 16

# What find-rho advises for the normalisation layers.
norm="--perturb_modules norm --ascent_fraction 0.25 --rho 3,10,30,100"
noisy="--label_noise 0.2 --train_size 400 --num_train_epochs 40"
find_rho convnext-noisy-norm $noisy $norm
find_rho convnext-noisy-1e-3-norm $noisy --learning_rate 1e-3 $norm
find_rho convnext-clean-norm --train_size 200 --num_train_epochs 60 $norm
find_rho convnext-clean-all-norm --num_train_epochs 20 $norm
find_rho resnet-noisy-norm $resnet --label_noise 0.2 --train_size 400 --learning_rate 1e-3 $norm
find_rho resnet-clean-norm $resnet --train_size 200 --learning_rate 3e-3 $norm
find_rho vit-noisy-norm $vit --label_noise 0.2 --train_size 600 --num_train_epochs 80 --learning_rate 3e-4 $norm
find_rho vit-noisy-all-norm $vit --label_noise 0.2 --num_train_epochs 30 --learning_rate 3e-4 $norm
find_rho vit-clean-norm $vit --train_size 300 --num_train_epochs 80 --learning_rate 1e-3 $norm
find_rho vit-clean-long-norm $vit --train_size 300 --num_train_epochs 160 --learning_rate 3e-4 $norm
find_rho finetune-convnext-noisy-norm $convnext_tuning --train_size 100 --label_noise 0.2 $norm
find_rho finetune-convnext-clean-norm $convnext_tuning --train_size 50 $norm

if [[ -z $made ]]; then
  echo "There is no study '$ONLY'. In this file are their names." >&2
  exit 1
fi
