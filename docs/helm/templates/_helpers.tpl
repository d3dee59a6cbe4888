{{- define "dpo.name" -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" -}}
{{- end }}

{{- define "dpo.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "dpo.labels" -}}
{{ include "dpo.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "dpo.secret" -}}
{{- .Values.secret.existing | default (include "dpo.name" .) -}}
{{- end }}

{{/* Restarts pods when the Secret of the chart changes. */}}
{{- define "dpo.checksum" -}}
checksum/secret: {{ toJson .Values.secret.values | sha256sum }}
{{- end }}

{{/* The fields of every pod: no token, no root, no further rights. */}}
{{- define "dpo.pod" -}}
automountServiceAccountToken: false
# A worker hands its job back within 20 s. The API gives open downloads 25 s.
terminationGracePeriodSeconds: 45
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  seccompProfile: {type: RuntimeDefault}
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{ toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* The fields of every container. Only /tmp and DPO_HOME can be written. */}}
{{- define "dpo.container" -}}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{/* The variables of all parts. Objects on a claim are a folder that all pods mount. */}}
{{- define "dpo.environment" -}}
{{- if .Values.objects.existingClaim }}
- {name: DPO_STORAGE_URL, value: "file:///objects"}
{{- end }}
- {name: HOME, value: /var/lib/dpo}  # libraries keep compiled kernels below it
{{- range $name, $value := .Values.environment }}
- {name: {{ $name }}, value: {{ $value | quote }}}
{{- end }}
{{- end }}

{{- define "dpo.objectsMount" -}}
{{- if .Values.objects.existingClaim }}
- {name: objects, mountPath: /objects}
{{- end }}
{{- end }}

{{- define "dpo.objectsVolume" -}}
{{- with .Values.objects.existingClaim }}
- {name: objects, persistentVolumeClaim: {claimName: {{ . }}}}
{{- end }}
{{- end }}

{{/* A worker writes a file every few seconds. If it is old, the process hangs. Takes the lane. */}}
{{- define "dpo.workerProbe" -}}
livenessProbe:
  exec:
    command: [sh, -c, 'test -n "$(find /var/lib/dpo/{{ . }}-worker.alive -mmin -2)"']
  initialDelaySeconds: 60
  periodSeconds: 30
  timeoutSeconds: 5
  failureThreshold: 4
{{- end }}
