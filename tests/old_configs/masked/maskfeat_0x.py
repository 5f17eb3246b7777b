_base_ = 'mae_0x.py'

model = dict(
    _delete_=True, type='MaskFeat', backbone=dict(type='MaskFeatViT', arch='b', patch_size=16, drop_path_rate=0),
    head=dict(type='MaskFeatPretrainHead', hog_dim=108), hog_para=dict(nbins=9, pool=8, gaussian_window=16))
steps = [
    dict(type='RandomResizedCrop', size=224, scale=(0.5, 1.0), interpolation=3),
    dict(type='RandomHorizontalFlip'),
    dict(type='ToTensor'),
    dict(type='Normalize', **_base_.numbers),
    dict(type='MaskFeatMaskGenerator', mask_window_size=14, mask_ratio=0.4, min_num_patches=15),
]
data = dict(samples_per_gpu=256, train=dict(pipeline=steps))
optimizer = dict(lr=1.6e-3, betas=(0.9, 0.999))
optimizer_config = dict(grad_clip=dict(max_norm=0.02))
lr_config = dict(warmup_iters=30, warmup_ratio=1e-6)
runner = dict(max_epochs=300)
